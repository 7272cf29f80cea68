"""The Triton kernels of recurrent layers, against plain PyTorch; see test_gpu_kernels.py."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.recurrent_nets import (
    DEVICE,
    NETS,
    STATES,
    TAPS,
    DeltaNet,
    Mamba2Net,
    convolved,
    make_batch,
    normal,
)
from tests.support.triton_launches import launches, where_triton_compiles
from workers import kernels
from workers.kernels.gpu import delta as gpu_delta
from workers.kernels.gpu import mamba2 as gpu_mamba2
from workers.layers.delta_net import DeltaTraits, GatedDeltaNet
from workers.layers.mamba2 import Mamba2, Mamba2Traits
from workers.parallel import Place

COUNTS, OWNERS = [2, 1, 5, 0, 1], [5, 0, 3, 3, 2]  # one row has no tokens, and another's state
CASES = [
    ("delta", (2, 4, 16, 16)),
    ("delta", (1, 1, 24, 20)),
    ("mamba2", (2, 4, 16, 16)),
    ("mamba2", (1, 2, 20, 24)),
]
ODD = [CASES[1], CASES[3]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
def test_a_step_is_that_of_pytorch(kind: str, shape: tuple[int, int, int, int]) -> None:
    """Rows of any length; states of no row, and of a row without tokens, stay as they are."""
    net = NETS[kind](*shape)
    past, state = net.past.clone(), net.state.clone()
    x = net.draw(sum(COUNTS))
    found = net.step(x, COUNTS, OWNERS)
    after = net.past.clone(), net.state.clone()
    net.past.copy_(past)
    net.state.copy_(state)
    rows = [i for i, count in enumerate(COUNTS) if count]
    expected = net.plain_step(x, [COUNTS[i] for i in rows], [OWNERS[i] for i in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[0], net.past, rtol=0, atol=0)
    torch.testing.assert_close(after[1], net.state, rtol=1e-4, atol=1e-5)
    assert torch.equal(after[1][[1, 4]], state[[1, 4]])


@pytest.mark.parametrize(("kind", "shape"), ODD, ids=str)
def test_no_bit_depends_on_how_tokens_come(kind: str, shape: tuple[int, int, int, int]) -> None:
    """At once, in chunks, or one by one among others."""
    net = NETS[kind](*shape)
    past, state = net.past.clone(), net.state.clone()
    x, others = net.draw(6), net.draw(6)
    expected = net.step(x, [6], [4])
    after = net.past[4].clone(), net.state[4].clone()
    for sizes, among in (([2, 1, 3], 0), ([1] * 6, 1)):
        net.past.copy_(past)
        net.state.copy_(state)
        found = []
        for i, part in enumerate(x.split(sizes)):
            both = torch.cat((others[i : i + among], part))
            found.append(net.step(both, [1] * among + [len(part)], [0] * among + [4])[among:])
        assert torch.equal(torch.cat(found), expected)
        assert torch.equal(net.past[4], after[0]) and torch.equal(net.state[4], after[1])


def make_delta_net(place: Place) -> GatedDeltaNet:
    traits = DeltaTraits(1, 2, 8, 12, TAPS, by_head=False)
    return GatedDeltaNet(place, "linear_attn", 24, traits, 1e-6)


def make_mamba2(place: Place) -> Mamba2:
    return Mamba2(place, "mixer", 24, Mamba2Traits(4, 12, 2, 8, TAPS, True), 1e-5)


@pytest.mark.parametrize("make", [make_delta_net, make_mamba2])
def test_the_layer_is_the_same_with_and_without_the_kernels(
    make: Callable[[Place], GatedDeltaNet | Mamba2], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(Place(DEVICE, torch.float32))
    for parameter in layer.parameters():
        parameter.fill(torch.randn(parameter.shape))
    x, before = normal(4, 24), layer.memory.allocate(STATES).normal_()
    batch = make_batch(x, [3, 1], [5, 2])
    found = []
    for there in (False, True):
        monkeypatch.setattr(kernels, "has_triton", lambda device, there=there: there)
        cache = before.clone()
        found.append((layer(x, batch, cache), cache))
    assert not torch.equal(found[0][1], before)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_convolutions_of_long_rows() -> None:
    """Longer than a tile, and of more channels than a program's."""
    net = DeltaNet(1, 1, 16, 50)
    past, counts, owners = net.past.clone(), [70, 1, 33], [5, 3, 0]
    x = normal(sum(counts), net.channels)
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    states = torch.tensor(owners, device=DEVICE)
    found = net.convolve(x, starts, states)
    for part, y, owner in zip(x.split(counts), found.split(counts), owners, strict=True):
        inputs = torch.cat((past[owner], part))
        expected = F.silu(convolved(inputs, net.weight))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(net.past[owner], inputs[1 - TAPS :])
    assert torch.equal(net.past[[1, 2, 4]], past[[1, 2, 4]])


def test_small_decays_are_as_exact_as_large_ones() -> None:
    """A state that hardly fades does not after thousands of tokens."""
    x = torch.tensor([-80.0, -17.0, -12.0, -3.0, 0.0, 4.0, 19.0, 30.0])
    starts = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    states = torch.tensor([2], device=DEVICE)
    expected = torch.exp(-1e4 * F.softplus(x.double()))

    def check(net: DeltaNet | Mamba2Net, recur: Callable[..., Tensor], gates: Tensor) -> None:
        net.heads.dt.zero_()
        net.heads.decay.fill_(-1e4)
        net.state.fill_(1.0)
        zeros = torch.zeros(1, net.channels, device=DEVICE)
        recur(zeros, gates[None].to(DEVICE), net.state, net.heads, starts, states)
        torch.testing.assert_close(net.state[2].double().cpu(), expected, rtol=1e-5, atol=1e-12)

    check(DeltaNet(1, 8, 1, 1), gpu_delta.recur, torch.cat((torch.zeros(8), x)))
    check(Mamba2Net(1, 8, 1, 1), gpu_mamba2.recur, x)


def compile_all(
    arch: int, dtype: torch.dtype, kind: str, shape: tuple[int, int, int, int]
) -> list[tuple[str, int]]:
    """The kernels that a layer's steps take, and their shared memory."""
    net = NETS[kind](*shape, torch.device("cpu"))
    with launches() as found:
        for counts in ([1, 1, 1], [1], [300, 1]):
            x = torch.zeros(sum(counts), net.width, dtype=dtype)
            net.step(x, counts, list(range(len(counts))))
    variants = {launch.variant: launch for launch in found}
    compiled = [variant.compile(arch) for variant in variants.values()]
    return [(kernel.metadata.name, kernel.metadata.shared) for kernel in compiled]


def test_the_kernels_compile_and_all_steps_share_that_of_the_rule() -> None:
    """Those of Qwen3-Next and of Nemotron-H."""
    with where_triton_compiles() as call:
        delta = call(compile_all, 90, torch.bfloat16, "delta", (16, 32, 128, 128))
        mamba2 = call(compile_all, 90, torch.bfloat16, "mamba2", (8, 128, 80, 128))
    assert [name for name, _ in delta] == ["_convolve", "_delta", "_gated", "_convolve"]
    assert [name for name, _ in mamba2] == ["_convolve", "_scan", "_of_gated", "_convolve"]
    assert max(shared for _, shared in delta + mamba2) < 48 << 10
