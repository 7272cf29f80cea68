"""A gated delta net's kernels on a GPU: decode against the memory's speed, and prompts.

    python -m benchmarks.gpu_delta [--rows 1 8 64 256] [--prompts 2048 8192] [--slices 16]

The heads of a layer of Qwen3.5-27B and of Qwen3-Next in bf16, without projections. Two layers are
captured in one CUDA graph, so that a layer's states are not in the cache from the time before where
there are many. Of each kernel and of all three: microseconds a layer, median of 5 times 20 replays;
of decode also the bytes of state read and written by the second, beside those of a copy on the same
card; of prompts (one row) microseconds a token. ``--slices`` tries columns of a program.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.device_time import captured, microseconds
from workers.kernels.delta import Heads
from workers.kernels.gpu import convolution, delta, norm

LAYERS = 2
TAPS = 4
SHAPES = {"Qwen3.5-27B": (16, 48, 128, 128), "Qwen3-Next": (16, 32, 128, 128)}
COPIED = 1 << 30  # bytes


class Layer:
    """Parameters and inputs of a step of ``counts`` tokens, and a state for each row."""

    def __init__(self, shape: tuple[int, int, int, int], counts: list[int]) -> None:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, device="cuda")

        keys, values, key_size, value_size = shape
        self.heads = Heads(
            keys, values, key_size, value_size, eps=1e-6, norm=normal(value_size),
            decay=-normal(values).abs(), dt=normal(values),
        )  # fmt: skip
        self.channels = 2 * keys * key_size + values * value_size
        self.weight = normal(self.channels, TAPS)
        past = (TAPS - 1) * self.channels
        cache = normal(len(counts), past + values * key_size * value_size)
        self.past = cache[:, :past].view(-1, TAPS - 1, self.channels)
        self.state = cache[:, past:]
        self.x = normal(sum(counts), self.channels + values * (value_size + 2)).bfloat16()
        self.starts = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
        self.states = torch.randperm(len(counts), device="cuda")
        self.qkv = self.convolve()

    def convolve(self) -> Tensor:
        return convolution.convolve(
            self.x[:, : self.channels], self.weight, self.past, self.starts, self.states
        )

    def recur(self, qkv: Tensor | None = None) -> Tensor:
        gates = self.x[:, -2 * self.heads.values :]
        qkv = self.qkv if qkv is None else qkv
        return delta.recur(qkv, gates, self.state, self.heads, self.starts, self.states)

    def gate(self, found: Tensor) -> Tensor:
        z = self.x[:, self.channels : -2 * self.heads.values]
        return norm.gated_rms_norm(found, z, self.heads.norm, self.heads.eps)

    def all(self) -> Tensor:
        return self.gate(self.recur(self.convolve()))


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
    layers = [Layer(SHAPES[name], counts) for _ in range(LAYERS)]
    found = [layer.recur() for layer in layers]
    parts = {
        "convolution": time([layer.convolve for layer in layers]),
        "rule": time([layer.recur for layer in layers]),
        "norm": time([lambda i=i: layers[i].gate(found[i]) for i in range(LAYERS)]),
        "all": time([layer.all for layer in layers]),
    }
    line = "  ".join(f"{part} {us:8.1f}" for part, us in parts.items())
    if len(counts) == sum(counts):
        speed = 2 * len(counts) * layers[0].state[0].nbytes / parts["rule"] * 1e6
        rest = f"{speed / 1e12:.2f} TB/s of state, {speed / limit:.2f} of a copy's"
    else:
        rest = f"{parts['rule'] / sum(counts):.3f} us a token in the rule"
    print(f"{name:12} {len(counts):4} x {counts[0]:<5} {line} us  {rest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--slices", type=int, nargs="*", default=[delta.SLICE])
    args = parser.parse_args()
    limit = copy_speed()
    print(f"{torch.cuda.get_device_name()}, a copy: {limit / 1e12:.2f} TB/s")
    for columns in args.slices:
        delta.SLICE = columns
        print(f"{columns} columns a program")
        for name in SHAPES:
            for rows in args.rows:
                measure(name, [1] * rows, limit)
            for length in args.prompts:
                measure(name, [length], limit)


if __name__ == "__main__":
    main()
