"""A layer of experts on a GPU: our kernels against PyTorch's grouped products.

    python -m benchmarks.gpu_experts [--rows 1 8 64 256 2048] [--shape 128 2048 768 8]

The shape is experts, hidden size, inner units and experts of a token; by default that of
Qwen3-30B-A3B. Each token chooses at random, all experts alike. Two layers are captured in one CUDA
graph, so that a layer's weights are not in the cache from the time before. Of each: microseconds a
layer, median of 5 times 20 replays in alternating runs, from the router's choice to the sum over a
token's experts; and the weights that were read by the second.
"""

import argparse
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device_time import captured, microseconds
from workers import kernels
from workers.kernels.gpu import experts

LAYERS = 2


@dataclass
class Layer:
    """Weights [experts, 2 · inner, hidden] and [experts, hidden, inner], and a step's choice."""

    gate_up: Tensor
    down: Tensor
    x: Tensor
    weights: Tensor
    chosen: Tensor


def make(rows: int, shape: list[int]) -> Layer:
    count, hidden, inner, each = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16) / size[-1] ** 0.5

    weights, chosen = torch.rand(rows, count, device="cuda").topk(each)
    return Layer(
        normal(count, 2 * inner, hidden), normal(count, hidden, inner), normal(rows, hidden),
        weights, chosen.int(),
    )  # fmt: skip


def ours(layer: Layer) -> Tensor:
    count, each = len(layer.gate_up), layer.chosen.shape[1]
    order = experts.sort(layer.chosen, 0, count, count)
    inner = experts.product(layer.x, layer.gate_up, order, each, gated=True)
    y = experts.product(inner, layer.down, order, 1)
    return experts.combine(y, layer.weights, layer.chosen, 0, count, None)


def grouped(layer: Layer) -> Tensor:
    tokens, each = layer.chosen.shape
    flat = layer.chosen.flatten()
    order = flat.argsort(stable=True)
    numbers = torch.arange(len(layer.gate_up), device=flat.device)
    ends = (flat[:, None] == numbers).sum(0).cumsum(0).int()
    x = layer.x[order // each]
    inner = kernels.silu_mul(F.grouped_mm(x, layer.gate_up.transpose(1, 2), offs=ends))
    y = torch.empty_like(x)
    y[order] = F.grouped_mm(inner, layer.down.transpose(1, 2), offs=ends)
    return (y.view(tokens, each, -1).float() * layer.weights[..., None]).sum(1).to(x.dtype)


@torch.inference_mode()
def measure(rows: int, shape: list[int]) -> None:
    layers = [make(rows, shape) for _ in range(LAYERS)]
    a, b = ours(layers[0]), grouped(layers[0])
    error = ((a - b).float().norm() / b.float().norm()).item()
    graphs = {
        name: captured([partial(way, layer) for layer in layers])
        for name, way in (("ours", ours), ("grouped_mm", grouped))
    }
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(6):
        for name, graph in graphs.items():
            time = microseconds(graph.replay, 20) / LAYERS
            if turn:
                found[name].append(time)
    hit = sum(len(layer.chosen.unique()) for layer in layers) / LAYERS
    size = hit * (layers[0].gate_up[0].nbytes + layers[0].down[0].nbytes)
    for name, times in found.items():
        time = statistics.median(times)
        print(f"{rows:5} rows  {name:10} {time:9.1f} us  {size / time / 1e6:5.2f} TB/s")
    print(f"{rows:5} rows  they differ by {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 256, 2048])
    parser.add_argument("--shape", type=int, nargs=4, default=[128, 2048, 768, 8])
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    for rows in args.rows:
        measure(rows, args.shape)


if __name__ == "__main__":
    main()
