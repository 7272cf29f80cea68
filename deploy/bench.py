"""``manta bench throughput``: offline throughput on random prompts."""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.sampling_params import SamplingParams


def throughput(args: argparse.Namespace, engine_options: dict[str, Any]) -> None:
    """Run random prompts to their full output length, and print tokens per second.

    Raises ConfigError, naming the option, for counts that make no sense.
    """
    for name in ("num_prompts", "input_len", "output_len", "repeat"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} must be at least 1, got {getattr(args, name)}")
    if args.output_json and not Path(args.output_json).absolute().parent.is_dir():
        raise ConfigError(f"--output-json must be a file in a folder, got {args.output_json!r}")
    from cluster.llm import LLM

    started = time.perf_counter()
    llm = LLM(args.model, **engine_options)
    params = SamplingParams(
        temperature=args.temperature, max_tokens=args.output_len, ignore_eos=True, detokenize=True
    )
    draw = random.Random(engine_options.get("seed", 0))
    vocab_size = min(llm.engine.facts.vocab_size, llm.tokenizer.vocab_size)
    ready = time.perf_counter() - started

    def run() -> float:
        prompts = [
            [draw.randrange(vocab_size) for _ in range(args.input_len)]
            for _ in range(args.num_prompts)
        ]
        start = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - start

    for _ in range(args.warmup):
        run()
    seconds = statistics.median(run() for _ in range(args.repeat))
    num_input = args.num_prompts * args.input_len
    num_output = args.num_prompts * args.output_len
    figures = {
        "model": args.model,
        "num_prompts": args.num_prompts,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "elapsed_time": seconds,
        "ready_time": ready,
        "requests_per_second": args.num_prompts / seconds,
        "tokens_per_second": (num_input + num_output) / seconds,
        "output_tokens_per_second": num_output / seconds,
    }
    print(
        f"Throughput: {figures['requests_per_second']:.2f} requests/s,"
        f" {figures['tokens_per_second']:.2f} total tokens/s,"
        f" {figures['output_tokens_per_second']:.2f} output tokens/s"
        f" ({seconds:.3f} s, ready in {ready:.2f} s)"
    )
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
