"""Offline throughput side by side with the peers, in alternating runs on one machine.

    python benchmarks/offline.py MODEL [MODEL ...] --vllm-python VENV/bin/python [--rounds 5]
    python benchmarks/offline.py MODEL --vllm-python VENV/bin/python --start

Each engine loads the model once, in a process of its own that sleeps while the others run; then
each shape is run in turn by all of them, ``--rounds`` times, after one warm-up. Random prompts
(new ones each time, the same for all), greedy, every request to its full length, bf16. The
figures are output tokens per second, of prefill shapes input tokens per second: medians, and the
median of the ratios round by round. ``--start`` instead measures the time from starting a process
to its first token.

vLLM is told to use all cores (its default on a CPU leaves one out). Give ``--vllm-python`` the
interpreter of an environment that has vLLM; without it only transformers is compared.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.sides import Side, make_prompts, serve  # noqa: E402

SHAPES = [(32, 128, 64), (8, 1024, 32), (1, 128, 64), (32, 128, 1), (8, 1024, 1)]
TRANSFORMERS_SHAPES = [(32, 128, 64)]
MAX_MODEL_LEN = 2048


# ---- one engine, in its own process ----


def serve_side(side: str, model: str) -> None:
    run = {"manta": manta_side, "vllm": vllm_side, "transformers": transformers_side}[side](model)

    def timed(command: list[int]) -> float:
        seed, count, input_len, output_len = command
        prompts = make_prompts(seed, count, input_len)
        started = time.perf_counter()
        produced = run(prompts, output_len)
        seconds = time.perf_counter() - started
        assert produced == count * output_len, (produced, count, output_len)
        return seconds

    serve(timed)


def manta_side(model: str) -> Any:
    from manta import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=MAX_MODEL_LEN, use_tqdm_on_load=False)

    def run(prompts: list[list[int]], output_len: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    return run


def vllm_side(model: str) -> Any:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(model, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)

    def run(prompts: list[list[int]], output_len: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    return run


def transformers_side(model: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    lm.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(prompts: list[list[int]], output_len: int) -> int:
        ids = torch.tensor(prompts)
        out = lm.generate(ids, do_sample=False, max_new_tokens=output_len, pad_token_id=1)
        return (out.shape[1] - ids.shape[1]) * len(prompts)

    return run


# ---- the driver ----


def compare(model: str, pythons: dict[str, str], rounds: int, shapes: list[Any]) -> None:
    sides = [Side(__file__, python, name, model) for name, python in pythons.items()]
    try:
        for number, shape in enumerate(shapes):
            count, input_len, output_len = shape
            if output_len == 1:
                tokens, unit = count * input_len, "input tok/s"
            else:
                tokens, unit = count * output_len, "output tok/s"
            seconds: dict[str, list[float]] = {}
            for turn in range(rounds + 1):
                for side in sides:
                    if side.name == "transformers" and shape not in TRANSFORMERS_SHAPES:
                        continue
                    taken = side.run([1000 * turn + number, *shape])  # no prompt comes twice
                    if turn:  # the first one warms up
                        seconds.setdefault(side.name, []).append(taken)
            mine = seconds["manta"]
            cells = [f"manta {tokens / statistics.median(mine):8.1f} {unit}"]
            for name, theirs in seconds.items():
                if name != "manta":
                    ratio = statistics.median(t / m for t, m in zip(theirs, mine, strict=True))
                    speed = tokens / statistics.median(theirs)
                    cells.append(f"{name} {speed:8.1f} ({ratio:.2f}x)")
            name = os.path.basename(model.rstrip("/"))
            print(f"{name} {count} x ({input_len}, {output_len}): " + ", ".join(cells), flush=True)
    finally:
        for side in sides:
            side.stop()


def start_to_first_token(model: str, pythons: dict[str, str], rounds: int) -> None:
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, python in pythons.items():
            if name == "transformers":
                continue
            started = time.perf_counter()
            side = Side(__file__, python, name, model)
            side.run([turn, 1, 16, 1], pause=0)
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - started)
            side.stop()
    cells = [f"{name} {statistics.median(s):.2f} s" for name, s in seconds.items()]
    if "vllm" in seconds:
        ratios = [m / t for m, t in zip(seconds["manta"], seconds["vllm"], strict=True)]
        cells.append(f"manta / vllm {statistics.median(ratios):.2f}")
    name = os.path.basename(model.rstrip("/"))
    print(f"{name} start to first token: " + ", ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start", action="store_true", help="start to first token")
    parser.add_argument("--shapes", help="only these, e.g. 32x128x64,1x128x64")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve_side(args.side, args.models[0])
        return
    pythons = {"manta": sys.executable}
    if args.vllm_python:
        pythons["vllm"] = args.vllm_python
    pythons["transformers"] = sys.executable
    shapes = SHAPES
    if args.shapes:
        shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]  # type: ignore
    for model in args.models:
        if args.start:
            start_to_first_token(model, pythons, args.rounds)
        else:
            compare(model, pythons, args.rounds, shapes)


if __name__ == "__main__":
    main()
