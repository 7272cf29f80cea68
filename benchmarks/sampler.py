"""Milliseconds for one call of the sampler, by kind of request, batch and vocabulary.

    python -m benchmarks.sampler [--device cuda] [--threads 2]

Logits are bf16, once ``sharp`` like a trained model's (a few tokens hold most of the mass), once
``flat`` like random weights' (top_p then keeps most of the vocabulary). Medians.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch import Tensor

from engine.plan import Admit
from engine.sampling_params import SamplingParams
from workers.sampler import Sampler, SamplingTable

PROMPT, OUTPUT = 128, 64  # tokens of each sequence
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "0.8, top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "top_k 50, top_p 0.9": SamplingParams(top_k=50, top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "greedy, penalties": SamplingParams(
        temperature=0, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5
    ),
    "greedy, 5 logprobs": SamplingParams(temperature=0, logprobs=5),
}


def logits_like(shape: str, n: int, vocab: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, vocab, generator=generator) * (3.5 if shape == "sharp" else 0.5)
    return x.to(device, torch.bfloat16)


def measure(params: SamplingParams, logits: Tensor, budget: float = 0.3) -> float:
    """Median seconds of as many calls as fit in ``budget`` seconds, at least 5."""
    n, vocab = logits.shape
    history = np.random.default_rng(n).integers(vocab, size=(n, PROMPT + OUTPUT), dtype=np.int32)
    table = SamplingTable(n, vocab, torch.from_numpy(history).to(logits.device))
    for slot in range(n):
        table.admit(Admit(slot, history[slot], PROMPT, params, seed=slot))
    sampler, slots = Sampler(table), np.arange(n, dtype=np.int32)
    times: list[float] = []
    while len(times) < 8 or sum(times) < budget:
        positions = np.full(n, PROMPT + 1 + len(times) % OUTPUT, np.int32)
        started = time.perf_counter()
        sampler.sample(logits, slots, positions)
        if logits.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 50272])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads, ms per call")
    for vocab in args.vocab:
        heads = "".join(f"{f'n = {n}':>18}" for n in args.batch)
        print(f"\n{f'vocabulary {vocab}':24}{heads}")
        print(f"{'':24}" + f"{'sharp':>10}{'flat':>8}" * len(args.batch))
        for name, params in KINDS.items():
            line = f"{name:24}"
            for n in args.batch:
                for shape, width in (("sharp", 10), ("flat", 8)):
                    seconds = measure(params, logits_like(shape, n, vocab, args.device))
                    line += f"{seconds * 1e3:{width}.2f}"
            print(line)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
