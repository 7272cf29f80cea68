"""Products with weights in codes, against the same weights as numbers: by Triton's interpreter
where there is no GPU, compiled where there is one."""

from dataclasses import replace

import pytest
import torch

from engine.errors import CheckpointError
from tests.support.triton_launches import launches, where_triton_compiles
from workers.kernels.gpu import coded, experts
from workers.quantization.codes import Coded, Codes, Grouping, Kind

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
OUTPUTS = 70
# Of groups of columns: how many there are of how many, from which column of the first on.
CASES: dict[str, tuple[Kind, int, Grouping, bool]] = {
    "fp8, outputs": (Kind.E4M3, 320, Grouping(1, 320), False),
    "fp8, blocks": (Kind.E4M3, 320, Grouping(3, 128), False),
    "fp8, a rank's part of blocks": (Kind.E4M3, 192, Grouping(3, 128, offset=96), False),
    "fp8, from the middle of a block": (Kind.E4M3, 192, Grouping(2, 128, offset=64), False),
    "8 bits": (Kind.INT8, 128, Grouping(2, 64), True),
    "8 bits, symmetric": (Kind.INT8, 96, Grouping(1, 96), False),
    "4 bits": (Kind.INT4, 320, Grouping(5, 64), True),
    "4 bits, symmetric": (Kind.INT4, 256, Grouping(2, 128), False),
    "4 bits, small groups": (Kind.INT4, 96, Grouping(3, 32), True),
    "4 bits, in another order": (
        Kind.INT4,
        320,
        Grouping(5, 64, of=torch.randperm(320, generator=torch.Generator().manual_seed(1)) // 64),
        True,
    ),
    "mxfp4": (Kind.E2M1, 160, Grouping(5, 32), False),
}


def make(case: str) -> tuple[Codes, Coded]:
    kind, columns, grouping, has_zeros = CASES[case]
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << kind.bits, (OUTPUTS, columns), dtype=torch.uint8)
    if kind is Kind.E4M3:
        codes[codes & 127 == 127] = 0  # which are NaN
    zeros = torch.randint(0, 1 << kind.bits, (OUTPUTS, grouping.count), dtype=torch.uint8)
    scales = torch.rand(OUTPUTS, grouping.count) + 0.1
    part = Codes(kind, codes, scales, grouping, zeros if has_zeros else None)
    weight = Coded("w", kind, (OUTPUTS, columns), grouping, has_zeros, DTYPE, DEVICE)
    weight[:30].copy_(part[:30])
    weight[30:].copy_(part[torch.arange(30, OUTPUTS)])
    return part, weight


@pytest.mark.parametrize("case", CASES)
def test_codes_become_the_numbers_that_they_are_while_loaded(case: str) -> None:
    part, weight = make(case)
    assert torch.equal(coded.decoded(weight).cpu(), part.values(DTYPE))


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_numbers(case: str) -> None:
    part, weight = make(case)
    x = torch.randn(64, weight.shape[1])
    for rows in (1, 17, 64) if case == "4 bits" else (3,):
        found = coded.few_rows(x[:rows].to(DEVICE, DTYPE), weight).cpu()
        expected = x[:rows].to(DTYPE).double() @ part.values(DTYPE).double().t()
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if torch.float32 == DTYPE else 4e-3)


def test_outputs_that_disagree_on_the_order_of_columns_are_refused() -> None:
    part, weight = make("4 bits, in another order")
    other = replace(part, grouping=Grouping(5, 64, of=torch.arange(320) // 64))
    with pytest.raises(CheckpointError, match="computed with w must have the same g_idx"):
        weight.copy_(other)


def compiled() -> int:
    """The kernels for a GPU of compute capability 9.0, with codes of two kinds."""
    (_, reordered), (_, mxfp4) = make("4 bits, in another order"), make("mxfp4")
    mxfp4.codes, mxfp4.scales = mxfp4.codes[None], mxfp4.scales[None]  # of one expert
    order = experts.Sorted(torch.zeros(3).int(), torch.zeros(2).int(), 1, 3.0)
    with launches() as found:
        coded.few_rows(torch.zeros(1, 320, dtype=torch.bfloat16), reordered)
        experts.product(torch.zeros(3, 160, dtype=torch.bfloat16), mxfp4, order, 1)
    return sum(".target sm_90" in launch.compile(90).asm["ptx"] for launch in found)


def test_kernels_compile_for_hopper() -> None:
    with where_triton_compiles() as call:
        assert call(compiled) == 2
