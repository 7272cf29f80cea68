"""Offline speed on GPUs, the same work on manta and on vLLM, one engine a process.

    python -m benchmarks.gpu shapes FOLDER
    python -m benchmarks.gpu manta FOLDER/llama-8b [--tensor-parallel-size 2] [--work decode-64 ...]
    python benchmarks/gpu.py vllm FOLDER/llama-8b          # in vLLM's environment

``shapes`` writes checkpoints without weights: the engines fill them with random numbers, since
speed does not depend on the values. Each work is a number of prompts of random tokens, greedy, each
request to its full length. It is run once to warm up, then ``--repeat`` times with new prompts.
Decode works also tell milliseconds a step: all requests run side by side, so that a step gives
each one token; the time of as many prompts with one output token is taken off.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parent / "shapes"  # configurations of real models
Length = int | tuple[int, int]
WORKS: dict[str, tuple[int, Length, Length]] = {  # prompts, input and output tokens
    "seed": (4, 6, 16),
    "decode-1": (1, 128, 256),
    "decode-8": (8, 128, 256),
    "decode-64": (64, 128, 256),
    "decode-256": (256, 128, 256),
    "decode-8-long": (8, 4096, 256),
    "prefill": (16, 2048, 1),
    "mixed": (256, (100, 1024), (100, 1024)),
}
Run = Callable[[list[list[int]], list[int]], float]


def write_shapes(folder: Path) -> None:
    """Config and a tokenizer of words for each shape."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    for shape in sorted(SHAPES.glob("*.json")):
        out = folder / shape.stem
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(shape.read_text())
        vocab_size = json.loads(shape.read_text())["vocab_size"]
        vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
        vocab |= {f"w{i}": i for i in range(3, vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(out / "tokenizer.json"))
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (out / "tokenizer_config.json").write_text(json.dumps(kind | special))
        print(out)


def start(args: argparse.Namespace) -> Run:
    """The engine: prompts and their output lengths to seconds."""
    options: dict[str, Any] = {
        "dtype": "bfloat16", "load_format": "dummy", "max_model_len": args.max_model_len,
        "tensor_parallel_size": args.tensor_parallel_size, "gpu_memory_utilization": 0.9,
        "distributed_executor_backend": "mp", "enable_prefix_caching": False,
    }  # fmt: skip
    if args.quantization is not None:
        options["quantization"] = args.quantization
    vllm = args.engine == "vllm"
    if vllm:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    else:
        from manta import LLM, SamplingParams
    llm = LLM(args.folder, **options)

    def run(prompts: list[list[int]], lengths: list[int]) -> float:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        given: list[Any] = [{"prompt_token_ids": p} for p in prompts]
        started = time.perf_counter()
        outputs = llm.generate(given, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        produced = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert produced == sum(lengths), (produced, sum(lengths))
        return seconds

    return run


def draw(rng: random.Random, length: Length) -> int:
    return length if isinstance(length, int) else rng.randint(*length)


def measure(run: Run, name: str, repeat: int, vocab: int) -> dict[str, Any]:
    """One work: medians, and the seconds of every turn."""
    count, input_len, output_len = WORKS[name]
    times: list[float] = []
    firsts: list[float] = []
    for turn in range(repeat + 1):
        rng = random.Random(1000 * turn + len(name))

        def prompt(length: int, rng: random.Random = rng) -> list[int]:
            return [rng.randrange(3, min(vocab, 30000)) for _ in range(length)]

        prompts = [prompt(draw(rng, input_len)) for _ in range(count)]
        lengths = [draw(rng, output_len) for _ in range(count)]
        first = run([prompt(len(p)) for p in prompts], [1] * count)
        seconds = run(prompts, lengths)
        if turn:
            times.append(seconds)
            firsts.append(first)
    middle = statistics.median(times)
    inputs, outputs = sum(map(len, prompts)), sum(lengths)
    result: dict[str, Any] = {
        "work": name, "seconds": [round(t, 4) for t in times],
        "output_tok_s": round(outputs / middle, 1), "input_tok_s": round(inputs / middle, 1),
    }  # fmt: skip
    if name.startswith("decode"):
        steps = lengths[0] - 1
        result["step_ms"] = round(1000 * (middle - statistics.median(firsts)) / steps, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("engine", choices=["shapes", "manta", "vllm"])
    parser.add_argument("folder")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--quantization")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", nargs="*", default=list(WORKS))
    args = parser.parse_args()
    if args.engine == "shapes":
        write_shapes(Path(args.folder))
        return
    config = json.loads((Path(args.folder) / "config.json").read_text())
    args.max_model_len = args.max_model_len or min(8192, config["max_position_embeddings"])
    started = time.perf_counter()
    run = start(args)
    what = {"engine": args.engine, "model": os.path.basename(args.folder)}
    what |= {"tensor_parallel_size": args.tensor_parallel_size, "quantization": args.quantization}
    ready = {"work": "start", "seconds": round(time.perf_counter() - started, 2)}
    print(json.dumps(what | ready), flush=True)
    for name in args.work:
        print(json.dumps(what | measure(run, name, args.repeat, config["vocab_size"])), flush=True)


if __name__ == "__main__":
    main()
