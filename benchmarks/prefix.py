"""A system prompt that 64 requests share: prefix hits and time to first token, beside vLLM's.

    python benchmarks/prefix.py MODEL --vllm-python VENV/bin/python [--rounds 3]

All requests come at once, with a new system prompt in each round, so that even the first hits are
on blocks that are being computed. Possible hits are the whole blocks of the system prompt, for
every request but the first. Times to first token are medians over the requests of a round, then
over alternating rounds; manta without its prefix cache shows what the hits are worth.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import Side, make_prompts, serve  # noqa: E402

REQUESTS, SYSTEM, USER, OUTPUT = 64, 512, 24, 16
BLOCKS = {"manta": 16, "nocache": 16, "vllm": 32}
MAX_MODEL_LEN = 2048


def prompts(seed: int) -> list[list[int]]:
    (system,) = make_prompts(seed, 1, SYSTEM)
    return [system + user for user in make_prompts(seed + 500_000, REQUESTS, USER)]


def manta_side(model: str, caching: bool) -> Any:
    from manta import LLM, SamplingParams

    llm = LLM(
        model, dtype="bfloat16", max_model_len=MAX_MODEL_LEN, use_tqdm_on_load=False,
        block_size=BLOCKS["manta"], enable_prefix_caching=caching,
    )  # fmt: skip

    def run(seed: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
        started = time.perf_counter()
        outputs = llm.generate(prompts(seed), params, use_tqdm=False)
        return {
            "seconds": time.perf_counter() - started,
            "first": [o.metrics.time_to_first_token for o in outputs],
            "hits": sum(o.num_cached_tokens or 0 for o in outputs),
        }

    return run


def vllm_side(model: str) -> Any:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        model, dtype="bfloat16", max_model_len=MAX_MODEL_LEN, block_size=BLOCKS["vllm"],
        disable_log_stats=False,
    )  # fmt: skip

    def run(seed: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
        inputs = [{"prompt_token_ids": p} for p in prompts(seed)]
        started = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return {
            "seconds": time.perf_counter() - started,
            "first": [o.metrics.first_token_latency for o in outputs],
            "hits": sum(o.num_cached_tokens or 0 for o in outputs),
        }

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        vllm = args.side == "vllm"
        serve(vllm_side(args.model) if vllm else manta_side(args.model, args.side == "manta"))
        return
    pythons = {"manta": sys.executable, "nocache": sys.executable}
    if args.vllm_python:
        pythons["vllm"] = args.vllm_python
    sides = [Side(__file__, python, name, args.model) for name, python in pythons.items()]
    answers: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    try:
        for turn in range(args.rounds + 1):
            for side in sides:
                if side.name == "nocache" and turn > 1:
                    continue  # it takes long and says little
                answer = side.run(turn + 1)
                if turn:  # the first one warms up
                    answers[side.name].append(answer)
    finally:
        for side in sides:
            side.stop()
    print(f"{Path(args.model).name}: {REQUESTS} requests, {SYSTEM} shared tokens, {USER} own")
    print("| side | hits of the possible | first token, median | last one's first token | all |")
    print("| --- | --- | --- | --- | --- |")
    for name, runs in answers.items():
        possible = (REQUESTS - 1) * (SYSTEM // BLOCKS[name]) * BLOCKS[name]
        first = statistics.median(statistics.median(r["first"]) for r in runs)
        last = statistics.median(max(r["first"]) for r in runs)
        hits = statistics.median(r["hits"] for r in runs)
        seconds = statistics.median(r["seconds"] for r in runs)
        print(
            f"| {name} | {100 * hits / possible:.1f} % | {first:.2f} s | {last:.2f} s |"
            f" {seconds:.2f} s |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
