"""Attention alone: microseconds per layer, and how near that is to the machine's limits.

    python benchmarks/attention.py [--dtype bfloat16] [--kv-cache-dtype fp8] [--block-size 32]
        [--repeats 15]

Decode cycles through enough layers that the processor's caches do not hold them, as a model does.
Prefill stands beside SDPA over contiguous tensors that need no cache. Medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention import AttentionShape, Prologue, choose_backend
from workers.attention.base import block_bytes
from workers.batch import Batch

BEYOND_CACHES = 256 << 20  # bytes


def batch_of(rows: list[tuple[int, int]], block_size: int) -> tuple[Batch, int]:
    """A batch of (queries, context) rows in shuffled blocks, and how many blocks it needs."""
    blocks = [-(-context // block_size) for _, context in rows]
    order = torch.randperm(sum(blocks)).int().split(blocks)
    tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
    positions = [torch.arange(context - queries, context) for queries, context in rows]
    cells = [t[p // block_size] * block_size + p % block_size
             for t, p in zip(order, positions, strict=True)]  # fmt: skip
    total = sum(queries for queries, _ in rows)
    return Batch(
        tokens=torch.zeros(total, dtype=torch.int64),
        positions=torch.cat(positions),
        query_starts=torch.tensor([0] + [n for n, _ in rows]).cumsum(0).int(),
        slots=torch.arange(len(rows)),
        context_lens=torch.tensor([context for _, context in rows]).int(),
        block_tables=tables,
        cells=torch.cat(cells).long(),
        max_context_len=max(context for _, context in rows),
    ), sum(blocks)


def median(run: Callable[[], object], calls: int, repeats: int) -> float:
    """Seconds of one call of which ``run`` makes ``calls``."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def measure(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Seconds per layer; bytes of keys and values read; floating point operations (causal)."""
    dtype = getattr(torch, options.dtype)
    shape = AttentionShape(
        heads, kv_heads, dim, dim**-0.5, options.block_size, dtype, torch.device("cpu"),
        fp8=options.kv_cache_dtype == "fp8",
    )  # fmt: skip
    backend = choose_backend(shape)
    batch, blocks = batch_of(rows, options.block_size)
    size = blocks * block_bytes(backend)
    layers = max(1, min(32, BEYOND_CACHES // size))
    caches = [backend.allocate(blocks) for _ in range(layers)]
    for cache in caches:
        cache.random_(116, 125) if shape.fp8 else cache.normal_()  # 8 bits: large, scaled down
    tokens = len(batch.positions)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)

    def step() -> None:
        begun = replace(batch, attention=backend.begin(batch, ()))
        for cache in caches:
            backend.attend(begun, cache, qkv, Prologue())

    seconds = median(step, layers, options.repeats)
    read = sum(context for _, context in rows) * block_bytes(backend) // options.block_size
    pairs = sum(n * (context - n) + n * (n + 1) // 2 for n, context in rows)
    return seconds, read, 4.0 * pairs * heads * dim


def measure_sdpa(
    count: int, length: int, heads: int, kv_heads: int, dim: int, options: argparse.Namespace
) -> float:
    dtype = getattr(torch, options.dtype)
    q, k, v = (
        torch.randn(count, length, n, dim, dtype=dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

    return median(run, 1, options.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    shapes = [("12 heads", 12, 12, 64), ("16 heads, 4 kv", 16, 4, 64)]
    print(f"{options.dtype}, block size {options.block_size}, {torch.get_num_threads()} threads\n")
    print(f"{'decode':<14}{'shape':<16}{'us/layer':>10}{'GB/s':>8}")
    for count, context in [(32, 160), (8, 1040), (1, 160), (1, 8192)]:
        for name, *shape in shapes:
            seconds, read, _ = measure([(1, context)] * count, *shape, options)
            print(f"{f'{count} x {context}':<14}{name:<16}{seconds * 1e6:>10.0f}"
                  f"{read / seconds / 1e9:>8.1f}")  # fmt: skip
    print(f"\n{'prefill':<14}{'shape':<16}{'us/layer':>10}{'GFLOP/s':>8}{'SDPA us':>10}")
    for count, length in [(32, 128), (2, 1024), (8, 1024)]:
        for name, *shape in shapes:
            seconds, _, flops = measure([(length, length)] * count, *shape, options)
            sdpa = measure_sdpa(count, length, *shape, options)
            print(f"{f'{count} x {length}':<14}{name:<16}{seconds * 1e6:>10.0f}"
                  f"{flops / seconds / 1e9:>8.0f}{sdpa * 1e6:>10.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
