"""Whether a request's tokens depend on what runs beside it, in bf16 on a GPU.

    python -m benchmarks.invariance MODEL [--requests 512] [--tensor-parallel-size 1]

Seeded requests of mixed kinds (greedy and sampled, n, logprobs, penalties; prompts of up to 4,096
tokens), some of them turns of conversations that go on with generated text, are run one by one,
without a prefix cache. Then all at once: cut into other chunks, preempted in each way with a tenth
of the blocks, with a prefix cache and without. Each run must give the same tokens. MODEL may be a
folder without weights: speed and bits do not need trained ones (``load_format="dummy"``).
"""

import argparse
import random
import sys
import time
from typing import Any

from manta import LLM, SamplingParams

MOST_PROMPT, MOST_OUTPUT = 4096, 64
RUNS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "chunks of 256": {"max_num_batched_tokens": 256},
    "chunks of 1,000": {"max_num_batched_tokens": 1000},
    "chunks of 8,192, 64 at once": {"max_num_batched_tokens": 8192, "max_num_seqs": 64},
    "without a prefix cache": {"enable_prefix_caching": False},
    "without graphs": {"enforce_eager": True},
    "few blocks, swapped": {"few": True, "preemption_mode": "swap"},
    "few blocks, recomputed": {"few": True, "preemption_mode": "recompute"},
    "few blocks, auto": {"few": True, "preemption_mode": "auto"},
}


def draw(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and parameters; every fourth prompt starts as an earlier one does."""
    rng = random.Random(0)
    prompts: list[list[int]] = []
    params = []
    for i in range(count):
        length = round(MOST_PROMPT ** rng.random())
        prompt = [rng.randrange(10, 30000) for _ in range(length)]
        if i % 4 == 3:
            prompt = prompts[rng.randrange(i)] + prompt
        prompts.append(prompt[: MOST_PROMPT - 2 * MOST_OUTPUT])
        kind: dict[str, Any] = {"temperature": 0}
        if i % 2:
            kind = {"temperature": rng.choice((0.7, 1.0)), "top_p": rng.choice((1.0, 0.9))}
            kind["top_k"] = rng.choice((0, 0, 40))
        params.append(
            SamplingParams(
                seed=i, n=1 + 2 * (i % 8 == 5), logprobs=2 if i % 3 == 0 else None,
                presence_penalty=0.5 * (i % 16 == 6), max_tokens=rng.randint(1, MOST_OUTPUT),
                ignore_eos=True, **kind,
            )
        )  # fmt: skip
    return prompts, params


def start(model: str, options: dict[str, Any], blocks: int) -> LLM:
    few = options.pop("few", False)
    return LLM(
        model, dtype="bfloat16", load_format="dummy", use_tqdm_on_load=False,
        max_model_len=MOST_PROMPT, num_gpu_blocks_override=blocks // 100 if few else blocks,
        **options,
    )  # fmt: skip


def tokens(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[tuple(c.token_ids) for c in output.outputs] for output in outputs]


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], alone: bool) -> list[Any]:
    """Two turns: the second goes on with what the first wrote."""
    found: list[Any] = []
    for turn in range(2):
        if turn:
            prompts = [p + list(f[0]) + [17, 4] for p, f in zip(prompts, found, strict=True)]
        if alone:
            turns = [tokens(llm, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
        else:
            order = list(range(len(prompts)))
            random.Random(turn).shuffle(order)
            mixed = tokens(llm, [prompts[i] for i in order], [params[i] for i in order])
            turns = [answer for _, answer in sorted(zip(order, mixed, strict=True))]
        found = [a + b for a, b in zip(found, turns, strict=True)] if turn else turns
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=40000)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    args = parser.parse_args()
    prompts, params = draw(args.requests)
    parallel = {"tensor_parallel_size": args.tensor_parallel_size}
    parallel |= {"distributed_executor_backend": "mp"}
    llm = start(args.model, {"enable_prefix_caching": False} | parallel, args.blocks)
    started = time.perf_counter()
    expected = run(llm, prompts, params, alone=True)
    total = sum(len(tokens) for answers in expected for tokens in answers)
    print(f"alone: {total} tokens in {time.perf_counter() - started:.1f} s", flush=True)
    llm.engine.stop()
    failed = False
    for name in args.runs:
        llm = start(args.model, RUNS[name] | parallel, args.blocks)
        started = time.perf_counter()
        found = run(llm, prompts, params, alone=False)
        seconds = time.perf_counter() - started
        wrong = sum(a != b for a, b in zip(found, expected, strict=True))
        stats = llm.engine.scheduler.stats
        print(
            f"{name}: {wrong} of {len(found)} requests differ; {seconds:.1f} s,"
            f" {stats.preemptions_swap} swaps, {stats.preemptions_recompute} recomputations",
            flush=True,
        )
        failed |= wrong > 0
        llm.engine.stop()
    sys.exit(failed)


if __name__ == "__main__":
    main()
