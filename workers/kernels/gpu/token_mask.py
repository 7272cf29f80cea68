"""Masks of tokens on logits: what a grammar does not allow. Bound by memory."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit(do_not_specialize_on_alignment=["logits", "rows", "masks"])
def _mask_rows(logits, rows, masks, STRIDE: tl.constexpr, V: tl.constexpr, WORDS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Grid (pieces, m). Adds -inf to logits [n, STRIDE] at rows [m] where the bit of ``masks``
    [m, WORDS] is 0: bit ``i % 32`` of word ``i // 32`` is token i's."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.program_id(1).to(tl.int64)
    word = tl.load(masks + index * WORDS + ids // 32, mask=ids < V, other=-1)
    banned = ((word >> (ids % 32)) & 1) == 0
    at = logits + tl.load(rows + index).to(tl.int64) * STRIDE + ids
    x = tl.load(at, mask=banned, other=0.0).to(tl.float32)
    tl.store(at, (x - float("inf")).to(logits.dtype.element_ty), mask=banned)


def mask_rows(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """-inf, in place, for the tokens of logits [n, V] at rows [m] int32 that masks [m, words] int32
    do not allow; NaN where they are NaN or +inf. A row's logits are contiguous."""
    vocab_size = logits.shape[1]
    grid = triton.cdiv(vocab_size, BLOCK), len(rows)
    _mask_rows[grid](logits, rows, masks, STRIDE=logits.stride(0), V=vocab_size,
                     WORDS=masks.shape[1], BLOCK=BLOCK)  # fmt: skip
