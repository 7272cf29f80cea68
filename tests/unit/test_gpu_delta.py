"""The Triton kernels of delta nets, against plain PyTorch; see test_gpu_kernels.py."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.triton_launches import launches, where_triton_compiles
from workers import kernels
from workers.batch import Batch
from workers.kernels import delta
from workers.kernels.gpu import convolution, norm
from workers.kernels.gpu import delta as gpu_delta
from workers.layers.delta_net import DeltaTraits, GatedDeltaNet
from workers.parallel import Place
from workers.sweep import Sweep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TAPS, STATES = 4, 6
COUNTS, OWNERS = [2, 1, 5, 0, 1], [5, 0, 3, 3, 2]  # one row has no tokens, and another's state


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def make_batch(x: Tensor, counts: list[int], owners: list[int]) -> Batch:
    """Of rows of so many tokens, with the states ``owners``, as recurrent layers see it."""
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    states = torch.tensor(owners, device=DEVICE)
    batch = Batch(
        tokens=x[:, 0], positions=states, cells=states, slots=states, query_starts=starts,
        context_lens=starts[1:], block_tables=states, max_context_len=0, states=states,
    )  # fmt: skip
    return replace(batch, sweep=Sweep(batch, TAPS))


def convolved(inputs: Tensor, weight: Tensor) -> Tensor:
    """[T, channels] of inputs [TAPS - 1 + T, channels], not by cuDNN, which may take TF32."""
    return sum(inputs[tap : len(inputs) - TAPS + 1 + tap] * weight[:, tap] for tap in range(TAPS))


class Net:
    """A layer's heads and convolutions, and the states of some sequences."""

    def __init__(
        self, keys: int, values: int, key_size: int, value_size: int, device: torch.device = DEVICE
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        self.heads = delta.Heads(
            keys, values, key_size, value_size, eps=1e-6, norm=normal(value_size),
            decay=-normal(values).abs(), dt=normal(values),
        )  # fmt: skip
        self.channels = 2 * keys * key_size + values * value_size
        self.weight = normal(self.channels, TAPS)
        self.past = normal(STATES, TAPS - 1, self.channels)
        self.state = normal(STATES, values * key_size * value_size + 3)[:, 3:]
        self.width = self.channels + values * (value_size + 2)

    def draw(self, tokens: int) -> Tensor:
        """q, k, v, z, b and a of so many tokens, as a part of something wider."""
        return normal(tokens, self.width + 5)[:, 5:]

    def step(self, x: Tensor, counts: list[int], owners: list[int]) -> Tensor:
        """By the kernels: x [T, width] of rows of so many tokens, with the states ``owners``."""
        starts = torch.tensor([0, *counts], device=x.device).cumsum(0).int()
        return self.run(x, starts, torch.tensor(owners, device=x.device))

    def run(self, x: Tensor, starts: Tensor, states: Tensor) -> Tensor:
        """The same of what is on the device."""
        qkv = convolution.convolve(x[:, : self.channels], self.weight, self.past, starts, states)
        z, gates = x[:, self.channels :].tensor_split([-2 * self.heads.values], 1)
        found = gpu_delta.recur(qkv, gates, self.state, self.heads, starts, states)
        return norm.gated_rms_norm(found, z, self.heads.norm, self.heads.eps)

    def plain_step(self, x: Tensor, counts: list[int], owners: list[int]) -> Tensor:
        """The same in PyTorch, of rows that all have tokens."""
        outputs = []
        for part, owner in zip(x.split(counts), owners, strict=True):
            inputs = torch.cat((self.past[owner], part[:, : self.channels]))
            self.past[owner] = inputs[1 - TAPS :]
            qkv, rest = convolved(inputs, self.weight), part[:, self.channels :]
            turns = make_batch(part, [len(part)], [owner]).sweep.turns
            outputs.append(delta._plain(qkv, rest, self.state, self.heads, turns))
        return torch.cat(outputs)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (1, 1, 24, 20)], ids=["grouped", "odd"])
def test_a_step_is_that_of_pytorch(shape: tuple[int, int, int, int]) -> None:
    """Rows of any length; states of no row, and of a row without tokens, stay as they are."""
    net = Net(*shape)
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


def test_no_bit_depends_on_how_tokens_come() -> None:
    """At once, in chunks, or one by one among others."""
    net = Net(1, 1, 24, 20)
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


def test_the_layer_is_the_same_with_and_without_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traits = DeltaTraits(1, 2, 8, 12, TAPS, by_head=False)
    layer = GatedDeltaNet(Place(DEVICE, torch.float32), "linear_attn", 24, traits, 1e-6)
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
    net = Net(1, 1, 16, 50)
    past, counts, owners = net.past.clone(), [70, 1, 33], [5, 3, 0]
    x = normal(sum(counts), net.channels)
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    states = torch.tensor(owners, device=DEVICE)
    found = convolution.convolve(x, net.weight, net.past, starts, states)
    for part, y, owner in zip(x.split(counts), found.split(counts), owners, strict=True):
        inputs = torch.cat((past[owner], part))
        expected = F.silu(convolved(inputs, net.weight))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(net.past[owner], inputs[1 - TAPS :])
    assert torch.equal(net.past[[1, 2, 4]], past[[1, 2, 4]])


def test_small_decays_are_as_exact_as_large_ones() -> None:
    """A state that hardly fades does not after thousands of tokens."""
    x = torch.tensor([-80.0, -17.0, -12.0, -3.0, 0.0, 4.0, 19.0, 30.0])
    net = Net(1, 8, 1, 1)
    net.heads.dt.zero_()
    net.heads.decay.fill_(-1e4)
    net.state.fill_(1.0)
    zeros = torch.zeros(1, net.channels, device=DEVICE)
    gates = torch.cat((torch.zeros(8), x))[None].to(DEVICE)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    states = torch.tensor([2], device=DEVICE)
    gpu_delta.recur(zeros, gates, net.state, net.heads, starts, states)
    expected = torch.exp(-1e4 * F.softplus(x.double()))
    torch.testing.assert_close(net.state[2].double().cpu(), expected, rtol=1e-5, atol=1e-12)


def compile_all(arch: int, dtype: torch.dtype) -> list[tuple[str, int]]:
    """The kernels that the steps of a Qwen3-Next's layer take, and their shared memory."""
    net = Net(16, 32, 128, 128, torch.device("cpu"))
    with launches() as found:
        for counts in ([1, 1, 1], [1], [300, 1]):
            x = torch.zeros(sum(counts), net.width, dtype=dtype)
            net.step(x, counts, list(range(len(counts))))
    variants = {launch.variant: launch for launch in found}
    compiled = [variant.compile(arch) for variant in variants.values()]
    return [(kernel.metadata.name, kernel.metadata.shared) for kernel in compiled]


def test_the_kernels_compile_and_all_steps_share_that_of_the_rule() -> None:
    with where_triton_compiles() as call:
        compiled = call(compile_all, 90, torch.bfloat16)
    assert [name for name, _ in compiled] == ["_convolve", "_delta", "_gated", "_convolve"]
    assert max(shared for _, shared in compiled) < 48 << 10
