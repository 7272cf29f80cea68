"""What a step's rows read from the worker's tables: token ids and cells. Bound by latency."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained


@triton.jit
def _look_up(
    tokens, tokens_stride, tables, tables_stride, slots, positions, ids, cells,
    count, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Token t of the step is position ``positions[t]`` of slot ``slots[t]``: its id to ``ids`` and
    its cell (block · BLOCK_SIZE + offset) to ``cells``."""
    begin(CHAINED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    slot = tl.load(slots + at, mask=mask, other=0).to(tl.int64)
    position = tl.load(positions + at, mask=mask, other=0)
    token = tl.load(tokens + slot * tokens_stride + position, mask=mask, other=0)
    block = tl.load(tables + slot * tables_stride + position // BLOCK_SIZE, mask=mask, other=0)
    tl.store(ids + at, token, mask=mask)
    tl.store(cells + at, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mask)


def look_up(
    tokens: Tensor, tables: Tensor, slots: Tensor, positions: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Ids and cells [T] int32 of the tokens at ``positions`` [T] of ``slots`` [T], int32, from the
    worker's tables: tokens [slots, length], block tables [slots, blocks]."""
    count = len(slots)
    ids, cells = (torch.empty(count, dtype=torch.int32, device=slots.device) for _ in range(2))
    _look_up[(triton.cdiv(count, 128),)](
        tokens, tokens.stride(0), tables, tables.stride(0), slots, positions, ids, cells, count,
        BLOCK_SIZE=block_size, BLOCK=128, **chained(slots.device),
    )  # fmt: skip
    return ids, cells
