"""The bf16 matrix product of gemm.h against float64, at every size of tile and ragged edges."""

import pytest
import torch

from tests.support.rows import check_rows
from workers.kernels.gemm import has_gemm
from workers.layers.linear import Packed

SHAPES = [(2, 1), (16, 31), (64, 32), (66, 33), (96, 100), (770, 257)]
ROWS = [*range(1, 31), 43, 200]


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def expected(x, weight, bias, residual, relu):
    y = x.double() @ weight.double().t()
    y = y if bias is None else y + bias.double()
    y = y.relu() if relu else y
    return y if residual is None else y + residual.double()


def product(weight: torch.Tensor, bias, relu: bool) -> Packed:
    """As a layer has it: through the kernel where the CPU has it, else what takes its place."""
    packed = Packed(weight, bias, "relu" if relu else "none")
    packed.ready(weight.clone())
    return packed


@pytest.mark.parametrize("inputs, outputs", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["plain", "relu", "residual"])
def test_products_equal_float64(inputs: int, outputs: int, with_bias: bool, kind: str) -> None:
    weight = bf16(outputs, inputs)
    bias = bf16(outputs) if with_bias else None
    packed = product(weight, bias, kind == "relu")
    for rows in ROWS:
        x = bf16(rows, inputs + 6)[:, 4 : 4 + inputs]  # strided, as a slice of a fused product
        residual = bf16(rows, outputs) if kind == "residual" else None
        y = packed(x, residual)
        reference = expected(x, weight, bias, residual, kind == "relu")
        scale = (x.double().abs() @ weight.double().abs().t()).amax() + reference.abs().amax()
        assert y.shape == (rows, outputs)
        assert ((y.double() - reference).abs() / scale).amax() < 2**-8


def test_no_bit_depends_on_the_batch_or_the_threads() -> None:
    weight, x = bf16(257, 770), bf16(200, 770)
    check_rows(product(weight, None, relu=False), x, ROWS)


def test_an_odd_number_of_inputs_and_other_types_are_left_to_others() -> None:
    assert not has_gemm(torch.bfloat16, 7)
    assert not has_gemm(torch.float32, 8)
    weight = bf16(8, 7)
    packed = product(weight, None, relu=False)
    x = bf16(3, 7)
    assert torch.allclose(packed(x).double(), expected(x, weight, None, None, False), atol=0.1)
