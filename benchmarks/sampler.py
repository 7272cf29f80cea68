"""What one call of the sampler takes, by kind of request, batch and vocabulary.

    python -m benchmarks.sampler [--threads 2]                       # milliseconds on a CPU
    python -m benchmarks.sampler --device cuda --vocab 128256 --batch 1 64 256
    python -m benchmarks.sampler --device cuda --vocab 128256 --check 20

On CUDA: microseconds that the device is busy (the call in a CUDA graph, many replays), and after
the slash those until the call returns. ``--plain`` is the same in PyTorch instead of Triton, wall
time. ``--check`` compares the tokens of both for random parameters, and those of rows alone with
those of their batch.

Logits are bf16, once ``sharp`` like a trained model's (a few tokens hold most of the mass), once
``flat`` like random weights' (top_p then keeps most of the vocabulary). Medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.device_time import microseconds
from engine.plan import Admit
from engine.sampling_params import SamplingParams
from workers.sampler import Sampler, SamplingTable

PROMPT, OUTPUT = 128, 64  # tokens of each sequence
REPLAYS = 50
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "0.8, top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k 50": SamplingParams(top_k=50),
    "top_k 50, top_p 0.9": SamplingParams(top_k=50, top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "greedy, penalties": SamplingParams(
        temperature=0, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5
    ),
    "greedy, 5 logprobs": SamplingParams(temperature=0, logprobs=5),
}


def logits_like(shape: str, n: int, vocab: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(n)
    x = torch.randn(n, vocab, generator=generator, device=device)
    return (x * (3.5 if shape == "sharp" else 0.5)).bfloat16()


def sampler_for(
    params: list[SamplingParams], vocab: int, device: str, kernels: bool | None = None
) -> Sampler:
    """A sampler with a slot for each of ``params``, in the middle of its answer."""
    n = len(params)
    history = np.random.default_rng(n).integers(vocab, size=(n, PROMPT + OUTPUT), dtype=np.int32)
    table = SamplingTable(n, vocab, torch.from_numpy(history).to(device), kernels)
    for slot, one in enumerate(params):
        table.admit(Admit(slot, history[slot], PROMPT, one, seed=slot))
    return Sampler(table)


def wall_seconds(sampler: Sampler, logits: Tensor, budget: float = 0.3) -> float:
    """Median of as many calls as fit in ``budget`` seconds, at least 5."""
    n = len(logits)
    slots, times = np.arange(n, dtype=np.int32), list[float]()
    while len(times) < 8 or sum(times) < budget:
        positions = np.full(n, PROMPT + 1 + len(times) % OUTPUT, np.int32)
        started = time.perf_counter()
        sampler.sample(logits, slots, positions)
        if logits.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def device_seconds(sampler: Sampler, logits: Tensor) -> tuple[float, float]:
    """Medians of a call: how long the device is busy, and how long until it returns."""
    n = len(logits)
    slots, positions = np.arange(n, dtype=np.int32), np.full(n, PROMPT + OUTPUT // 2, np.int32)
    rows = torch.from_numpy(slots).cuda(), torch.from_numpy(positions).cuda()

    def call() -> None:
        sampler.sample(logits, slots, positions, rows, keep=True)

    call()
    torch.cuda.synchronize()
    returned = list[float]()
    for _ in range(REPLAYS):
        started = time.perf_counter()
        call()
        returned.append(time.perf_counter() - started)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return busy_seconds(graph.replay), statistics.median(returned)


def busy_seconds(work: Callable[[], Any]) -> float:
    """Median seconds of ``work`` on the device, of groups that follow each other closely."""
    return statistics.median(microseconds(work, REPLAYS) / 1e6 for _ in range(5))


def cell(params: SamplingParams, logits: Tensor, plain: bool) -> str:
    """One number of the table, or two on CUDA."""
    n, vocab = logits.shape
    sampler = sampler_for([params] * n, vocab, logits.device.type, False if plain else None)
    if logits.is_cuda and not plain:
        busy, returned = device_seconds(sampler, logits)
        return f"{busy * 1e6:.0f}/{returned * 1e6:.0f}"
    return f"{wall_seconds(sampler, logits) * 1e3:.2f}"


def random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    """Any mix of what acts on the draw."""
    some: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0, 1.5]),
        "top_k": int(rng.choice([0, 1, 20, 50, 1000])),
        "top_p": rng.choice([0.3, 0.9, 1.0]),
        "min_p": rng.choice([0.0, 0.05]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "presence_penalty": rng.choice([0.0, 0.5]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "logprobs": int(rng.choice([0, 1, 5, 20])),
    }
    if rng.random() < 0.2:
        some["logit_bias"] = {int(t): float(rng.normal()) for t in rng.integers(vocab, size=300)}
    if rng.random() < 0.2:
        some["allowed_token_ids"] = [int(t) for t in rng.integers(vocab, size=2000)]
    return SamplingParams(**{k: v.item() if hasattr(v, "item") else v for k, v in some.items()})


def check(turns: int, n: int, vocab: int, device: str) -> None:
    """Prints how many tokens differ between Triton and PyTorch (float32: next to none, for sums
    have other orders), and how many between a row alone and in its batch (bf16: none)."""
    rng = np.random.default_rng(0)
    differ = alone_differ = logprobs_differ = 0
    slots, positions = np.arange(n, dtype=np.int32), np.full(n, PROMPT + OUTPUT // 2, np.int32)
    for turn in range(turns):
        params = [random_params(rng, vocab) for _ in range(n)]
        logits = logits_like("flat" if turn % 2 else "sharp", n, vocab, device)
        triton, plain = (sampler_for(params, vocab, device, kernels) for kernels in (True, False))
        found, expected = (
            s.sample(logits.float(), slots, positions).to_host() for s in (triton, plain)
        )
        differ += int((found.tokens != expected.tokens).sum())
        whole = triton.sample(logits, slots, positions).to_host()
        for row in range(n):
            at = slice(row, row + 1)
            one = triton.sample(logits[at], slots[at], positions[at]).to_host()
            alone_differ += int(one.tokens[0] != whole.tokens[row])
            same = np.array_equal(one.logprobs[0].logprobs, whole.logprobs[row].logprobs)
            logprobs_differ += int(not same)
    print(
        f"{turns * n} rows of {vocab}: {differ} tokens differ from PyTorch's; alone,"
        f" {alone_differ} tokens and the log-probabilities of {logprobs_differ} rows do"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 50272])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--check", type=int, metavar="TURNS")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.check:
        for vocab in args.vocab:
            check(args.check, max(args.batch), vocab, args.device)
        return
    kernels = args.device == "cuda" and not args.plain
    unit = "microseconds busy / until it returns" if kernels else "ms per call"
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(f"{args.device}, {where}, {unit}")
    for vocab in args.vocab:
        heads = "".join(f"{f'n = {n}':>20}" for n in args.batch)
        print(f"\n{f'vocabulary {vocab}':24}{heads}")
        print(f"{'':24}" + f"{'sharp':>10}{'flat':>10}" * len(args.batch))
        for name, params in KINDS.items():
            cells = (
                cell(params, logits_like(shape, n, vocab, args.device), args.plain)
                for n in args.batch
                for shape in ("sharp", "flat")
            )
            print(f"{name:24}" + "".join(f"{text:>10}" for text in cells))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
