"""The bf16 product with codes of 4 bits of codes.h, against float64."""

import pytest
import torch
from torch import Tensor

from tests.support.rows import check_rows
from workers.kernels.gemm_codes import CodesGemm, has_gemm_codes
from workers.layers.linear import Packed
from workers.quantization.codes import Coded, Codes, Grouping, Kind

BF16, CPU = torch.bfloat16, torch.device("cpu")
CASES = {
    "symmetric": (Kind.INT4, 256, Grouping(2, 128), False),
    "zeros": (Kind.INT4, 320, Grouping(10, 32), True),
    "outputs": (Kind.INT4, 98, Grouping(1, 98), True),
    "a rank's part of groups": (Kind.INT4, 48, Grouping(3, 32, offset=24), True),
    "mxfp4": (Kind.E2M1, 96, Grouping(3, 32), False),
}
ROWS = [*range(1, 26), 43, 200]


def make(case: str, outputs: int, bias: Tensor | None = None) -> tuple[Packed, Tensor]:
    """The product as a layer has it, through the kernel where the CPU has it, else of numbers; and
    the weight as numbers in float64."""
    kind, columns, grouping, has_zeros = CASES[case]
    torch.manual_seed(columns)
    codes = torch.randint(0, 16, (outputs, columns), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (outputs, grouping.count), dtype=torch.uint8)
    scales = torch.rand(outputs, grouping.count) + 0.1
    part = Codes(kind, codes, scales, grouping, zeros if has_zeros else None)
    if not has_gemm_codes(kind, grouping, BF16):
        numbers = part.values(BF16)
        packed = Packed(numbers, bias)
        packed.ready(numbers.clone())
        return packed, numbers.double()
    weight = Coded("w", kind, (outputs, columns), grouping, has_zeros, BF16, CPU)
    weight.copy_(part)
    packed = Packed(weight, bias)
    packed.ready(weight)
    assert isinstance(packed._gemm, CodesGemm) and packed.weight is None
    return packed, part.values(torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("outputs", [31, 64, 100])
def test_products_equal_float64(case: str, outputs: int) -> None:
    bias = torch.randn(outputs).bfloat16()
    packed, weight = make(case, outputs, bias)
    for rows in ROWS if outputs == 100 else (1, 13):
        x = torch.randn(rows, weight.shape[1] + 6).bfloat16()[:, 4:-2]
        residual = torch.randn(rows, outputs).bfloat16()
        expected = x.double() @ weight.t() + bias.double() + residual.double()
        scale = (x.double().abs() @ weight.abs().t()).amax()
        assert ((packed(x, residual).double() - expected).abs() / scale).amax() < 2**-9


@pytest.mark.parametrize("case", CASES)
def test_no_bit_depends_on_the_batch_or_the_threads(case: str) -> None:
    packed, weight = make(case, 257)
    check_rows(packed, torch.randn(200, weight.shape[1]).bfloat16(), ROWS)


def test_what_is_not_in_pairs_or_not_in_order_is_left_to_numbers() -> None:
    of = torch.zeros(64, dtype=torch.int32)
    for grouping in (Grouping(2, 33), Grouping(2, 32, offset=1), Grouping(2, 32, of=of)):
        assert not has_gemm_codes(Kind.INT4, grouping, BF16)
    assert not has_gemm_codes(Kind.E4M3, Grouping(1, 64), BF16)
    assert not has_gemm_codes(Kind.INT4, Grouping(1, 64), torch.float32)
