"""Inputs rounded to E4M3, and their products with weights of E4M3: by Triton's interpreter where
there is no GPU, compiled where there is one."""

import pytest
import torch
from torch import Tensor

from tests.support.triton_launches import launches, where_triton_compiles
from workers.kernels.gpu import coded, experts, fp8_product, rounding
from workers.quantization.codes import Coded, Codes, Grouping, Kind
from workers.quantization.rounding import Rounder, Rounding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
OUTPUTS = 70
# Columns, the groups of the weight's, the rounding, and from where on in a group inputs are.
CASES: dict[str, tuple[int, Grouping, Rounding, int]] = {
    "tokens, outputs": (320, Grouping(1, 320), Rounding(), 0),
    "the checkpoint's scale": (1100, Grouping(1, 1100), Rounding(static=True), 0),
    "128 × 128": (320, Grouping(3, 128), Rounding(128), 0),
    "powers of two": (320, Grouping(3, 128), Rounding(128, powers=True), 0),
    "a part from the middle of a group": (200, Grouping(2, 256, 128), Rounding(256), 128),
    "tokens, groups": (256, Grouping(2, 128), Rounding(), 0),
    "groups of other sizes": (96, Grouping(4, 32, 16), Rounding(32), 16),
}
SERVED = [case for case in CASES if case != "groups of other sizes"]


def make_rounder(case: str) -> Rounder:
    _, _, how, offset = CASES[case]
    rounder = Rounder(how, DEVICE, offset)
    if how.static:
        for scale in (0.004, -0.005, 0.003):
            rounder.learn(torch.tensor([scale], device=DEVICE))
    return rounder


def make(case: str) -> tuple[Tensor, Coded]:
    """The numbers of a weight, and its codes."""
    torch.manual_seed(0)
    columns, grouping, _, _ = CASES[case]
    codes = torch.randint(0, 256, (OUTPUTS, columns), dtype=torch.uint8)
    codes[codes & 127 == 127] = 0  # which are NaN
    part = Codes(Kind.E4M3, codes, torch.rand(OUTPUTS, grouping.count) + 0.1, grouping)
    weight = Coded(
        "w", Kind.E4M3, (OUTPUTS, columns), grouping, False, DTYPE, DEVICE,
        rounder=make_rounder(case),
    )  # fmt: skip
    weight.copy_(part)
    return part.values(torch.float64), weight


def draw(rows: int, columns: int) -> Tensor:
    """Of very different sizes, as a part of something wider; one row is all zeros."""
    x = torch.randn(rows, columns + 5) * torch.rand(rows, 1).mul(8).sub(6).exp()
    x[-1] = 0
    return x.to(DEVICE, DTYPE)[:, 5:]


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_those_of_pytorch_in_every_bit(case: str) -> None:
    torch.manual_seed(0)
    rounder, x = make_rounder(case), draw(7, CASES[case][0])
    x[2] = 0
    ties = torch.tensor([448.0, 17.0, 19.0, -21.0, 2**-10, 3 * 2**-10, 2**-6 - 2**-10])
    x[2, : len(ties)] = ties.to(x)  # as they are, but for the checkpoint's scale
    found, expected = rounding.rounded(x, rounder), rounder.codes(x)
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(found[1].expand_as(expected[1]), expected[1])
    x[0, 3] = torch.nan
    for codes, _ in (rounding.rounded(x, rounder), rounder.codes(x)):
        assert codes[0, 3].isnan() and not codes[1:].isnan().any()


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_rounded_numbers(case: str) -> None:
    numbers, weight = make(case)
    assert weight.rounder is not None and fp8_product.serves(weight) == (case in SERVED)
    x = draw(3, weight.shape[1])
    codes, _ = weight.rounder.codes(x)
    assert codes.float().abs().max() <= 448
    found = coded.product(x, weight).cpu()
    expected = weight.rounder.values(x.double()).cpu() @ numbers.t()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if torch.float32 == DTYPE else 4e-3)


def test_no_bit_depends_on_the_other_rows() -> None:
    for case in ("tokens, outputs", "128 × 128"):
        _, weight = make(case)
        x = draw(70, weight.shape[1])
        whole = coded.product(x, weight)
        for rows in (1, 17, 64):
            assert torch.equal(coded.product(x[:rows], weight), whole[:rows])


@pytest.mark.parametrize("case", ["tokens, outputs", "128 × 128", "groups of other sizes"])
def test_experts_have_the_same_products(case: str) -> None:
    _, weight = make(case)
    x, chosen = draw(5, weight.shape[1]).contiguous(), torch.tensor([[1, 0], [1, 2]] * 3)[:5]
    order = experts.sort(chosen.int().to(DEVICE), 0, 3, 3)
    weight.codes = torch.stack([weight.codes, weight.codes.flip(0), weight.codes.roll(1, 0)])
    weight.scales = torch.stack([weight.scales] * 3)
    found = experts.product(x, weight, order, 2).view(5, 2, OUTPUTS)
    for column in (0, 1):
        for token, expert in enumerate(chosen[:, column].tolist()):
            expected = coded.product(x[token : token + 1], weight[expert])[0]
            torch.testing.assert_close(found[token, column], expected, rtol=1e-3, atol=1e-3)


def compiled() -> list[set[str]]:
    """The products' instructions on a GPU of compute capability 9.0."""
    with launches() as found:
        for case in ("tokens, outputs", "128 × 128"):
            _, weight = make(case)
            weight.dtype = torch.bfloat16
            for rows in (1, 32, 64, 300):
                coded.product(torch.zeros(rows, weight.shape[1], dtype=torch.bfloat16), weight)
        weight.codes, weight.scales = weight.codes[None], weight.scales[None]
        order = experts.Sorted(torch.zeros(3).int(), torch.zeros(2).int(), 1, 3.0)
        experts.product(torch.zeros(3, 320, dtype=torch.bfloat16), weight, order, 1)
    variants = {launch.variant: launch for launch in found}
    used = []
    for launch in variants.values():
        text = launch.compile(90).asm["ptx"]
        words = {word for word in text.split() if word.startswith(("wgmma.mma", "mma."))}
        used.append({word.partition(".f32")[2] for word in words})
    return used


def test_kernels_compile_for_hopper_and_all_products_use_its_units_for_codes() -> None:
    with where_triton_compiles() as call:
        used = [words for words in call(compiled) if words]
    assert len(used) == 9
    assert all(words == {".e4m3.e4m3"} for words in used)
