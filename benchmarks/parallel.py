"""One process against ranks on the same cores: tensor parallel and pipeline parallel.

python -m benchmarks.parallel MODEL [--partition 8,4] [--rounds 5]

One process with two threads, two tensor-parallel ranks with a thread each, two pipeline stages with
a thread each and two batches in flight, in alternating rounds on the same random prompts. With
--partition, pipelines of that partition instead of tensor-parallel ranks.
"""

import workers  # noqa: F401, I001  # before torch

import argparse
import random
import statistics
import time
from typing import Any

from manta import LLM, SamplingParams

WORKLOADS = [(32, 128, 64), (8, 128, 64), (32, 256, 1)]


def run(llm: LLM, count: int, inputs: int, outputs: int, seed: int) -> float:
    """Tokens per second: of the output, or of the input where there is next to no output."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 30000) for _ in range(inputs)] for _ in range(count)]
    params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return count * (outputs if outputs > 1 else inputs) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--partition")
    args = parser.parse_args()
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 512,
        "kv_cache_memory_bytes": 256 << 20,
        "swap_space": 0,
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
        "distributed_executor_backend": "mp",
    }
    shapes: dict[str, dict[str, Any]] = {
        "one process": {},
        "TP 2": {"tensor_parallel_size": 2},
        "PP 2": {"pipeline_parallel_size": 2},
    }
    if args.partition:
        del shapes["TP 2"]
        shapes["PP 2"]["pipeline_partition"] = args.partition
    llms = {name: LLM(args.model, **options, **shape) for name, shape in shapes.items()}
    for count, inputs, outputs in WORKLOADS:
        rates: dict[str, list[float]] = {name: [] for name in shapes}
        for number in range(args.rounds + 1):
            for name, llm in llms.items():
                time.sleep(0.2)  # whoever ran before may still spin
                rate = run(llm, count, inputs, outputs, number)
                if number:  # the first is to warm up
                    rates[name].append(rate)
        print(f"{count} × ({inputs}, {outputs})", end="")
        for name in shapes:
            pairs = zip(rates[name], rates["one process"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"  {name} {statistics.median(rates[name]):.1f} ({ratio:.2f})", end="")
        print(flush=True)
    for llm in llms.values():
        llm.engine.stop()


if __name__ == "__main__":
    main()
