"""A recurrent layer's kernels on a GPU: decode against the memory's speed, and prompts.

    python -m benchmarks.gpu_recurrent [--rows 1 8 64 256] [--prompts 2048 8192] [--slices 16]

The convolutions and heads of a layer of Qwen3.5-27B and Qwen3-Next (gated delta nets), and of
Nemotron-H 8B and Nemotron Nano 2 9B (Mamba-2), in bf16, without projections. Two layers are
captured in one CUDA graph, so that a layer's states are not in the cache from the time before where
there are many. Of each kernel and of all three: microseconds a layer, median of 5 times 20 replays;
of decode also the bytes of state read and written by the second, beside those of a copy on the same
card; of prompts (one row) microseconds a token. ``--slices`` tries columns of a program.
"""

import argparse
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.device_time import captured, microseconds
from workers.kernels import delta, mamba2
from workers.kernels.gpu import convolution, norm
from workers.kernels.gpu import delta as gpu_delta
from workers.kernels.gpu import mamba2 as gpu_mamba2

LAYERS = 2
TAPS = 4
COPIED = 1 << 30  # bytes


def normal(*size: int) -> Tensor:
    return torch.randn(size, device="cuda")


class Layer(ABC):
    """Parameters and inputs of a step of ``counts`` tokens, and a state for each row."""

    def __init__(
        self, channels: int, beside: int, state: int, bias: bool, counts: list[int]
    ) -> None:
        self.channels = channels
        self.weight, self.bias = normal(channels, TAPS), normal(channels) if bias else None
        past = (TAPS - 1) * channels
        cache = normal(len(counts), past + state)
        self.past = cache[:, :past].view(-1, TAPS - 1, channels)
        self.state = cache[:, past:]
        x = normal(sum(counts), channels + beside).bfloat16()
        self.x, self.rest = x[:, :channels], x[:, channels:]
        self.starts = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
        self.states = torch.randperm(len(counts), device="cuda")
        self.convolved = self.convolve()

    def convolve(self) -> Tensor:
        return convolution.convolve(
            self.x, self.weight, self.bias, self.past, self.starts, self.states
        )

    @abstractmethod
    def recur(self, convolved: Tensor) -> Tensor: ...

    @abstractmethod
    def gate(self, found: Tensor) -> Tensor: ...

    def all(self) -> Tensor:
        return self.gate(self.recur(self.convolve()))


class DeltaNet(Layer):
    def __init__(self, shape: tuple[int, int, int, int], counts: list[int]) -> None:
        keys, values, key_size, value_size = shape
        self.heads = delta.Heads(
            *shape, decay=-normal(values).abs(), dt=normal(values), norm=normal(value_size),
            eps=1e-6,
        )  # fmt: skip
        channels = 2 * keys * key_size + values * value_size
        state = values * key_size * value_size
        super().__init__(channels, values * (value_size + 2), state, False, counts)

    def recur(self, convolved: Tensor) -> Tensor:
        gates = self.rest[:, -2 * self.heads.values :]
        return gpu_delta.recur(convolved, gates, self.state, self.heads, self.starts, self.states)

    def gate(self, found: Tensor) -> Tensor:
        z = self.rest[:, : -2 * self.heads.values]
        return norm.gated_rms_norm(found, z, self.heads.norm, self.heads.eps)


class Mamba2(Layer):
    def __init__(self, shape: tuple[int, int, int, int], counts: list[int]) -> None:
        groups, count, size, state_size = shape
        inner = count * size
        self.heads = mamba2.Heads(
            *shape, decay=-normal(count).abs(), dt=normal(count), skip=normal(count),
            norm=normal(inner), eps=1e-5,
        )  # fmt: skip
        channels = inner + 2 * groups * state_size
        super().__init__(channels, inner + count, inner * state_size, True, counts)

    def recur(self, convolved: Tensor) -> Tensor:
        times = self.rest[:, -self.heads.count :]
        return gpu_mamba2.recur(convolved, times, self.state, self.heads, self.starts, self.states)

    def gate(self, found: Tensor) -> Tensor:
        z, heads = self.rest[:, : -self.heads.count], self.heads
        return norm.rms_norm_of_gated(found, z, heads.norm, heads.groups, heads.eps)


MODELS: dict[str, tuple[Callable[..., Layer], tuple[int, int, int, int]]] = {
    "Qwen3.5-27B": (DeltaNet, (16, 48, 128, 128)),
    "Qwen3-Next": (DeltaNet, (16, 32, 128, 128)),
    "Nemotron-H 8B": (Mamba2, (8, 128, 64, 128)),
    "Nano 2 9B": (Mamba2, (8, 128, 80, 128)),
}


def time(runs: list[Callable[[], object]]) -> float:
    """Median microseconds of one of ``runs``, which are captured together."""
    graph = captured(runs)
    found = [microseconds(graph.replay, 20) / len(runs) for _ in range(6)]
    return statistics.median(found[1:])


def copy_speed() -> float:
    """Bytes read and written by the second."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / time([lambda: target.copy_(source)]) * 1e6


@torch.inference_mode()
def measure(name: str, counts: list[int], limit: float) -> None:
    make, shape = MODELS[name]
    layers = [make(shape, counts) for _ in range(LAYERS)]
    found = [layer.recur(layer.convolved) for layer in layers]
    parts = {
        "convolution": time([layer.convolve for layer in layers]),
        "recurrence": time([lambda layer=layer: layer.recur(layer.convolved) for layer in layers]),
        "norm": time([lambda i=i: layers[i].gate(found[i]) for i in range(LAYERS)]),
        "all": time([layer.all for layer in layers]),
    }
    line = "  ".join(f"{part} {us:8.1f}" for part, us in parts.items())
    if len(counts) == sum(counts):
        speed = 2 * len(counts) * layers[0].state[0].nbytes / parts["recurrence"] * 1e6
        rest = f"{speed / 1e12:.2f} TB/s of state, {speed / limit:.2f} of a copy's"
    else:
        rest = f"{parts['recurrence'] / sum(counts):.3f} us a token in the recurrence"
    print(f"{name:13} {len(counts):4} x {counts[0]:<5} {line} us  {rest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--slices", type=int, nargs="*", default=[gpu_delta.SLICE])
    args = parser.parse_args()
    limit = copy_speed()
    print(f"{torch.cuda.get_device_name()}, a copy: {limit / 1e12:.2f} TB/s")
    for columns in args.slices:
        gpu_delta.SLICE = gpu_mamba2.SLICE = columns
        print(f"{columns} columns a program")
        for name in MODELS:
            for rows in args.rows:
                measure(name, [1] * rows, limit)
            for length in args.prompts:
                measure(name, [length], limit)


if __name__ == "__main__":
    main()
