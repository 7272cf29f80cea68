"""Masks on logits: compiled for CPUs, in PyTorch, and by Triton's kernel (by its interpreter where
there is no GPU)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.matcher import Masks
from tests.support.triton_launches import launches, where_triton_compiles
from workers import kernels
from workers.kernels import plain
from workers.kernels.gpu import token_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(vocab: int, rows: int) -> tuple[torch.Tensor, Masks, np.ndarray]:
    """Logits [rows, vocab], masks [rows, words] of some more tokens, and the same as bools."""
    rng = np.random.default_rng(vocab)
    allowed = rng.random((rows, (vocab // 32 + 2) * 32)) < rng.random((rows, 1))
    masks = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))
    return logits, masks, allowed[:, :vocab]


WAYS = {"compiled": kernels.mask_rows, "plain": plain.mask_rows, "triton": token_mask.mask_rows}
each_way = pytest.mark.parametrize("way", WAYS)


def applied(way: str, logits: torch.Tensor, rows: list[int], masks: Masks) -> torch.Tensor:
    """``logits`` masked in one of the ways."""
    device = DEVICE if way == "triton" else "cpu"
    result = logits.to(device, copy=True)
    at = torch.tensor(rows, dtype=torch.int32, device=device)
    WAYS[way](result, at, torch.from_numpy(masks.copy()).to(device))
    return result.cpu()


@each_way
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 4096, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_allowed_is_minus_infinity(way: str, vocab: int, dtype: torch.dtype) -> None:
    logits, masks, allowed = example(vocab, 6)
    masks[1], allowed[1] = -1, True
    logits, rows = logits.to(dtype), [4, 0, 5]
    expected = logits.clone()
    for number, row in enumerate(rows):
        expected[row, ~torch.from_numpy(allowed[number])] = -torch.inf
    assert torch.equal(applied(way, logits, rows, masks[:3]), expected)


@each_way
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_is_not_lost(way: str) -> None:
    logits = torch.zeros(2, 40)
    logits[0, 3], logits[1, 7] = torch.nan, torch.inf
    masked = applied(way, logits, [0, 1], np.zeros((2, 2), np.int32))
    assert masked[0, 3].isnan() and masked[1, 7].isnan()
    assert int(masked.isneginf().sum()) == 78


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
            token_mask.mask_rows(logits, at, torch.zeros(rows, vocab // 32 + 1, dtype=torch.int32))
    variants = {launch.variant: launch for launch in found}
    return [variant.compile(arch).metadata.shared for variant in variants.values()]


@pytest.mark.parametrize(
    "arch, dtype, vocab", [(80, torch.float16, 50257), (90, torch.bfloat16, 128256)], ids=str
)
def test_the_kernel_compiles_once(
    arch: int, dtype: torch.dtype, vocab: int, compiling: Callable[..., Any]
) -> None:
    assert compiling(compile_all, arch, dtype, vocab) == [0]
