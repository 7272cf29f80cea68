"""The heads and convolutions of recurrent layers, by Triton's kernels and in plain PyTorch."""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from workers.batch import Batch
from workers.kernels import delta, mamba2
from workers.kernels.gpu import convolution, norm
from workers.kernels.gpu import delta as gpu_delta
from workers.kernels.gpu import mamba2 as gpu_mamba2
from workers.sweep import Sweep, Turns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TAPS, STATES = 4, 6


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


class Net(ABC):
    """A layer's heads and convolutions of ``channels``, and the states of some sequences;
    ``beside`` are the other inputs of a token."""

    def __init__(
        self, channels: int, beside: int, state: int, bias: bool, device: torch.device
    ) -> None:
        self.channels, self.width = channels, channels + beside
        self.weight = torch.randn(channels, TAPS, device=device)
        self.bias = torch.randn(channels, device=device) if bias else None
        self.past = torch.randn(STATES, TAPS - 1, channels, device=device)
        self.state = torch.randn(STATES, state + 3, device=device)[:, 3:]

    def draw(self, tokens: int) -> Tensor:
        """What goes in for so many tokens, as a part of something wider."""
        return normal(tokens, self.width + 5)[:, 5:]

    def step(self, x: Tensor, counts: list[int], owners: list[int]) -> Tensor:
        """By the kernels: x [T, width] of rows of so many tokens, with the states ``owners``."""
        starts = torch.tensor([0, *counts], device=x.device).cumsum(0).int()
        return self.run(x, starts, torch.tensor(owners, device=x.device))

    def run(self, x: Tensor, starts: Tensor, states: Tensor) -> Tensor:
        """The same of what is on the device."""
        y = self.convolve(x[:, : self.channels], starts, states)
        return self.recur(y, x[:, self.channels :], starts, states)

    def convolve(self, x: Tensor, starts: Tensor, states: Tensor) -> Tensor:
        return convolution.convolve(x, self.weight, self.bias, self.past, starts, states)

    @abstractmethod
    def recur(self, y: Tensor, rest: Tensor, starts: Tensor, states: Tensor) -> Tensor:
        """The heads, gate and norm, by the kernels."""

    def plain_step(self, x: Tensor, counts: list[int], owners: list[int]) -> Tensor:
        """``step`` in PyTorch, of rows that all have tokens."""
        outputs = []
        for part, owner in zip(x.split(counts), owners, strict=True):
            inputs = torch.cat((self.past[owner], part[:, : self.channels]))
            self.past[owner] = inputs[1 - TAPS :]
            y, rest = convolved(inputs, self.weight), part[:, self.channels :]
            turns = make_batch(part, [len(part)], [owner]).sweep.turns
            outputs.append(self.plain(y if self.bias is None else y + self.bias, rest, turns))
        return torch.cat(outputs)

    @abstractmethod
    def plain(self, y: Tensor, rest: Tensor, turns: Turns) -> Tensor:
        """``recur`` in PyTorch, of y before SiLU."""


class DeltaNet(Net):
    """Of a gated delta net."""

    def __init__(
        self, keys: int, values: int, key_size: int, value_size: int, device: torch.device = DEVICE
    ) -> None:
        channels = 2 * keys * key_size + values * value_size
        state = values * key_size * value_size
        super().__init__(channels, values * (value_size + 2), state, False, device)
        self.heads = delta.Heads(
            keys, values, key_size, value_size, eps=1e-6,
            norm=torch.randn(value_size, device=device),
            decay=-torch.randn(values, device=device).abs(), dt=torch.randn(values, device=device),
        )  # fmt: skip

    def recur(self, y: Tensor, rest: Tensor, starts: Tensor, states: Tensor) -> Tensor:
        z, gates = rest.tensor_split([-2 * self.heads.values], 1)
        found = gpu_delta.recur(y, gates, self.state, self.heads, starts, states)
        return norm.gated_rms_norm(found, z, self.heads.norm, self.heads.eps)

    def plain(self, y: Tensor, rest: Tensor, turns: Turns) -> Tensor:
        return delta._plain(y, rest, self.state, self.heads, turns)


class Mamba2Net(Net):
    """Of Mamba-2."""

    def __init__(
        self, groups: int, count: int, size: int, state_size: int, device: torch.device = DEVICE
    ) -> None:
        inner = count * size
        channels = inner + 2 * groups * state_size
        super().__init__(channels, inner + count, inner * state_size, True, device)
        self.heads = mamba2.Heads(
            groups, count, size, state_size, eps=1e-5, norm=torch.randn(inner, device=device),
            decay=-torch.randn(count, device=device).abs(), dt=torch.randn(count, device=device),
            skip=torch.randn(count, device=device),
        )  # fmt: skip

    def recur(self, y: Tensor, rest: Tensor, starts: Tensor, states: Tensor) -> Tensor:
        z, times = rest.tensor_split([-self.heads.count], 1)
        found = gpu_mamba2.recur(y, times, self.state, self.heads, starts, states)
        heads = self.heads
        return norm.rms_norm_of_gated(found, z, heads.norm, heads.groups, heads.eps)

    def plain(self, y: Tensor, rest: Tensor, turns: Turns) -> Tensor:
        return mamba2._plain(y, rest, self.state, self.heads, turns)


NETS = {"delta": DeltaNet, "mamba2": Mamba2Net}
