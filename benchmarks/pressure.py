"""Throughput when the KV cache holds far less than the load needs: manta's preemption modes and
vLLM, which recomputes.

    python benchmarks/pressure.py MODEL --vllm-python VENV/bin/python [--rounds 3]

All have the same pool in tokens, and the same prompts; greedy, every output to its full length,
bf16. Output tokens per second: medians over alternating rounds, and the ratio to the first side,
median of the rounds' ratios. Recomputed tokens are those whose keys and values were computed,
given up and computed again. In recompute mode blocks that are given up stay cached, in CPU blocks
too; recompute0 has no CPU blocks, and so computes again what vLLM does. ``--count`` counts vLLM's,
in a run of its own, as that needs its engine in this process.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import Side, make_prompts, serve  # noqa: E402

# Requests, prompt and output, and what share of the tokens of all of them the pool holds.
SHAPES = {"short": (24, 64, 128), "long": (6, 640, 256)}
SHARES = {"short": 10, "long": 4}
MANTA_BLOCK, VLLM_BLOCK = 16, 32  # vLLM's CPU build prefers multiples of 32
MAX_MODEL_LEN = 2048


def pool(shape: str) -> int:
    """Tokens, in whole blocks of either size."""
    count, prompt, output = SHAPES[shape]
    return count * (prompt + output) // SHARES[shape] // VLLM_BLOCK * VLLM_BLOCK


def manta_side(mode: str, shape: str, model: str) -> Any:
    from manta import LLM, SamplingParams

    llm = LLM(
        model, dtype="bfloat16", use_tqdm_on_load=False, preemption_mode=mode.rstrip("0"),
        swap_space=0.0 if mode.endswith("0") else 4.0, block_size=MANTA_BLOCK,
        num_gpu_blocks_override=pool(shape) // MANTA_BLOCK,
    )  # fmt: skip
    stats = llm.engine.scheduler.stats

    def run(argument: tuple[int, int, int, int]) -> dict[str, float]:
        seed, count, prompt, output = argument
        prompts = make_prompts(seed, count, prompt)
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        before = replace(stats)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == output for o in outputs)
        swaps = stats.preemptions_swap - before.preemptions_swap
        recomputes = stats.preemptions_recompute - before.preemptions_recompute
        return {
            "seconds": seconds,
            "preemptions": swaps + recomputes,
            "recomputed": stats.recomputed_tokens - before.recomputed_tokens,
        }

    return run


def vllm_side(counted: bool, shape: str, model: str) -> Any:
    if counted:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        model, dtype="bfloat16", max_model_len=min(MAX_MODEL_LEN, pool(shape)),
        block_size=VLLM_BLOCK, num_gpu_blocks_override=pool(shape) // VLLM_BLOCK + 1,
    )  # fmt: skip  # one of its blocks is never given away
    seen = {"preemptions": 0, "recomputed": 0}
    if counted:
        count_preemptions(llm.llm_engine.engine_core.engine_core.scheduler, seen)

    def run(argument: tuple[int, int, int, int]) -> dict[str, float]:
        seed, count, prompt, output = argument
        prompts = make_prompts(seed, count, prompt)
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        seen.update(preemptions=0, recomputed=0)
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == output for o in outputs)
        return {"seconds": seconds, **seen}

    return run


def count_preemptions(scheduler: Any, seen: dict[str, int]) -> None:
    """Note vLLM's preemptions in ``seen``, and the tokens that its prefix cache does not save."""
    preempt, cache = scheduler._preempt_request, scheduler.kv_cache_manager
    find, lost = cache.get_computed_blocks, {}

    def preempting(request: Any, *args: Any, **options: Any) -> Any:
        seen["preemptions"] += 1
        seen["recomputed"] += request.num_computed_tokens
        lost[request.request_id] = 0  # of these, found in the cache when it comes back
        return preempt(request, *args, **options)

    def finding(request: Any, *args: Any, **options: Any) -> Any:
        found = find(request, *args, **options)
        if request.request_id in lost:  # asked again while there is no room for it
            seen["recomputed"] -= found[1] - lost[request.request_id]
            lost[request.request_id] = found[1]
        return found

    scheduler._preempt_request, cache.get_computed_blocks = preempting, finding


def compare(model: str, shape: str, modes: list[str], vllm: str | None, rounds: int) -> None:
    num, prompt, output = SHAPES[shape]
    names = [f"manta-{mode}-{shape}" for mode in modes]
    pythons = dict.fromkeys(names, sys.executable)
    if vllm:
        pythons[f"vllm-{shape}"] = vllm
    sides = [Side(__file__, python, name, model) for name, python in pythons.items()]
    answers: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    try:
        for side in sides:
            side.run((1, 2, 64, 8))  # warms up
        for turn in range(rounds):
            at = turn % len(sides)  # each is first, and right after each other one, in turn
            for side in sides[at:] + sides[:at]:
                answer = side.run((turn + 2, num, prompt, output))
                answers[side.name].append(answer)
                print(f"{side.name}, round {turn}: {answer}", file=sys.stderr, flush=True)
    finally:
        for side in sides:
            side.stop()
    print(f"{Path(model).name}, {num} x ({prompt}, {output}), {pool(shape)} tokens of KV cache")
    print("| side | output tok/s | to auto | preemptions | recomputed tokens |")
    print("| --- | --- | --- | --- | --- |")
    first = answers[names[0]]
    for name, runs in answers.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        ratio = statistics.median(
            a["seconds"] / r["seconds"] for a, r in zip(first, runs, strict=True)
        )
        preemptions = statistics.median(r["preemptions"] for r in runs)
        recomputed = statistics.median(r["recomputed"] for r in runs)
        print(
            f"| {name.rsplit('-', 1)[0]} | {num * output / seconds:.1f} | {ratio:.3f} |"
            f" {preemptions:.0f} | {recomputed:.0f} |", flush=True,
        )  # fmt: skip


def count(model: str, shape: str, vllm: str) -> None:
    """What vLLM preempts and computes again in a run; not timed."""
    side = Side(__file__, vllm, f"vllmcount-{shape}", model)
    try:
        print(shape, side.run((2, *SHAPES[shape])))
    finally:
        side.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", default=["auto", "swap", "recompute", "recompute0"])
    parser.add_argument("--count", action="store_true", help="count vLLM's preemptions instead")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        engine, *mode, shape = args.side.split("-")
        if engine == "manta":
            serve(manta_side(mode[0], shape, args.model))
        else:
            serve(vllm_side(engine == "vllmcount", shape, args.model))
        return
    for shape in args.shapes:
        if args.count:
            count(args.model, shape, args.vllm_python)
        else:
            compare(args.model, shape, args.modes, args.vllm_python, args.rounds)


if __name__ == "__main__":
    main()
