"""Products with quantized weights on a GPU: microseconds, and how many times as fast as in bf16.

    python -m benchmarks.gpu_coded [--rows 1 8 16 64 256 2048]

The linears of a Llama 8B, each after more weights than the card's cache holds, in a CUDA graph.
Medians.
"""

import argparse

import torch
from triton.testing import do_bench_cudagraph

from workers import kernels, products
from workers.quantization.codes import Coded, Grouping, Kind
from workers.quantization.rounding import Rounder, Rounding

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
KINDS = {  # columns of a group, whether there are zeros, and how inputs are rounded
    "fp8 outputs": (Kind.E4M3, None, False),
    "fp8 outputs, inputs": (Kind.E4M3, None, False, Rounding()),
    "fp8 128 × 128": (Kind.E4M3, 128, False),
    "fp8 128 × 128, inputs": (Kind.E4M3, 128, False, Rounding(128)),
    "int4 of 128": (Kind.INT4, 128, False),
    "int4 of 128, asymmetric": (Kind.INT4, 128, True),
    "mxfp4": (Kind.E2M1, 32, False),
}
BEYOND_CACHES = 200 << 20  # bytes


def coded(
    shape: tuple[int, int],
    kind: Kind,
    size: int | None,
    zeros: bool,
    rounding: Rounding | None = None,
) -> Coded:
    """A weight of random codes."""
    columns = shape[1]
    grouping = Grouping(columns // (size or columns), size or columns)
    device = torch.device("cuda")
    rounder = None if rounding is None else Rounder(rounding, device)
    weight = Coded("weight", kind, shape, grouping, zeros, torch.bfloat16, device, rounder=rounder)
    weight.codes.random_(0, 120)
    weight.scales.fill_(0.01)
    if weight.zeros is not None:
        weight.zeros.fill_(kind.middle)
    return weight


def microseconds(rows: int, weights: list) -> float:
    """Of one product with each of the weights in turn."""
    x = torch.randn(rows, weights[0].shape[1], dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        for weight in weights:
            kernels.product(x, weight)

    run()
    return 1e3 * do_bench_cudagraph(run, return_mode="median") / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 256, 2048])
    args = parser.parse_args()
    products.set_up(invariant=True)
    print(torch.cuda.get_device_name())
    print("| linear | weights |", " | ".join(f"{rows} rows" for rows in args.rows), "|")
    for name, shape in SHAPES.items():
        count = 1 + BEYOND_CACHES // (2 * shape[0] * shape[1])
        plain = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
        base = [microseconds(rows, plain) for rows in args.rows]
        print(f"| {name} | bf16 |", " | ".join(f"{t:.1f}" for t in base), "|")
        for what, kind in KINDS.items():
            weights = [coded(shape, *kind) for _ in range(4 * count)]
            times = [microseconds(rows, weights) for rows in args.rows]
            cells = (f"{t:.1f} ({b / t:.2f})" for t, b in zip(times, base, strict=True))
            print(f"| {name} | {what} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
