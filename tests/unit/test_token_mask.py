"""Masks on logits, in PyTorch and by Triton's kernel (its interpreter where there is no GPU)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.matcher import Masks
from tests.support.triton_launches import launches, where_triton_compiles
from workers.grammar_table import mask_logits
from workers.kernels.gpu.token_mask import mask_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(vocab: int, rows: int) -> tuple[torch.Tensor, Masks, np.ndarray]:
    """Logits [rows, vocab], masks [rows, words] of some more tokens, and the same as bools."""
    rng = np.random.default_rng(vocab)
    allowed = rng.random((rows, (vocab // 32 + 2) * 32)) < rng.random((rows, 1))
    masks = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))
    return logits, masks, allowed[:, :vocab]


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 4096, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_what_is_not_allowed_is_minus_infinity(vocab: int, dtype: Any, by_kernel: bool) -> None:
    logits, masks, allowed = example(vocab, 6)
    logits = logits.to(dtype).to(DEVICE if by_kernel else "cpu")
    before, rows = logits.cpu().clone(), [4, 0, 5]
    if by_kernel:
        at, bits = torch.tensor(rows, dtype=torch.int32), torch.from_numpy(masks[:3].copy())
        mask_rows(logits, at.to(DEVICE), bits.to(DEVICE))
    else:
        mask_logits(logits, rows, masks[:3])
    expected = before.clone()
    for number, row in enumerate(rows):
        expected[row, ~torch.from_numpy(allowed[number])] = -torch.inf
    assert torch.equal(logits.cpu(), expected)


@pytest.mark.parametrize("by_kernel", [False, True])
def test_what_is_not_finite_is_not_lost(by_kernel: bool) -> None:
    logits = torch.zeros(2, 40, device=DEVICE if by_kernel else "cpu")
    logits[0, 3], logits[1, 7] = torch.nan, torch.inf
    masks = np.zeros((2, 2), np.int32)
    if by_kernel:
        rows = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
        mask_rows(logits, rows, torch.from_numpy(masks).to(DEVICE))
    else:
        mask_logits(logits, [0, 1], masks)
    assert logits[0, 3].isnan() and logits[1, 7].isnan()
    assert int(logits.isneginf().sum()) == 78


@pytest.fixture(scope="module")
def compiling() -> Iterator[Callable[..., Any]]:
    with where_triton_compiles() as call:
        yield call


def compile_all(arch: int, dtype: torch.dtype, vocab: int) -> list[int]:
    """The kernel, as often as different logits, rows and masks need it."""
    with launches() as found:
        for rows in (1, 2, 7):
            logits = torch.zeros(8, vocab, dtype=dtype)[8 - rows :]
            at = torch.zeros(2 * rows, dtype=torch.int32)[rows:]
            mask_rows(logits, at, torch.zeros(rows, vocab // 32 + 1, dtype=torch.int32))
    variants = {launch.variant: launch for launch in found}
    return [variant.compile(arch).metadata.shared for variant in variants.values()]


@pytest.mark.parametrize(
    "arch, dtype, vocab", [(80, torch.float16, 50257), (90, torch.bfloat16, 128256)], ids=str
)
def test_the_kernel_compiles_once(
    arch: int, dtype: torch.dtype, vocab: int, compiling: Callable[..., Any]
) -> None:
    assert compiling(compile_all, arch, dtype, vocab) == [0]
