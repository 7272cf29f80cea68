"""What a step on a GPU is made of: its time, and that of its kernels.

    python -m benchmarks.gpu_step FOLDER/llama-8b [--context 256] [--rows 1 64 256] [--prompts 4]

Captured steps of as many rows are replayed by themselves, without a host that plans, on random
weights and contexts of random blocks (FOLDER: see benchmarks/gpu.py). Of each: milliseconds (median
of 3 times 20), then its kernels by time, with how many there are and microseconds each. With
chained launches a kernel's time begins while the one before it still runs, so these add up to more
than the step. ``--prompts``: also a step that computes so many prompts of 2,048 tokens, launched
one by one.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.config import EngineConfig
from engine.plan import Admit, StepPlan, ints
from engine.sampling_params import SamplingParams
from workers import products
from workers.graphs import Graphs, Size
from workers.messages import Units
from workers.worker import Worker

BLOCK_SIZE = 16
PROMPT = 2048  # tokens


def prepare(folder: str, rows: list[int], context: int, prompts: int) -> tuple[Worker, Graphs]:
    """A worker whose slots hold sequences of ``context`` tokens, and its graphs of ``rows``."""
    products.set_up(True)
    most = max(rows)
    config = EngineConfig.from_options(
        model=folder, dtype="bfloat16", load_format="dummy", device="cuda", max_num_seqs=most,
        max_model_len=max(PROMPT, 2 * context), use_tqdm_on_load=False,
        max_num_batched_tokens=max(most, prompts * PROMPT),
    )  # fmt: skip
    worker = Worker(config, Path(folder), torch.device("cuda", 0))
    facts = worker.load()
    print(f"{torch.cuda.get_device_name()}, batch-invariant: {facts.batch_invariant}")
    per_row = -(-max(context + 1, PROMPT) // BLOCK_SIZE)
    worker._make_tables(Units(most * per_row, 0))
    for cache in worker.kv.layers:
        cache.normal_()
    blocks = np.random.default_rng(0).permutation(most * per_row)
    cells = [(s, i, blocks[s * per_row + i]) for s in range(most) for i in range(per_row)]
    greedy = SamplingParams(temperature=0)
    admits = tuple(Admit(s, ints([5] * context), context, greedy, seed=0) for s in range(most))
    worker.slots.update(StepPlan(0, *[ints()] * 4, ints(cells), admits))
    graphs = worker._graphs
    assert graphs is not None, "steps cannot be captured here"
    with torch.inference_mode():
        worker._capture(graphs, [Size(n, n, True) for n in sorted(rows, reverse=True)])
    return worker, graphs


def replay(worker: Worker, graphs: Graphs, rows: int, context: int, times: int) -> None:
    size, many = Size(rows, rows, True), [1] * rows
    plan = StepPlan(1, ints(range(rows)), ints([context] * rows), ints(many), ints(many), ints())
    worker._prepare(plan, size, whole=False)
    for _ in range(times):
        graphs.replay(size)
    torch.cuda.synchronize()


def prefill(worker: Worker, prompts: int) -> Callable[[int], None]:
    """Computes a step of so many whole prompts, so many times."""
    many = [PROMPT] * prompts
    wants = ints([1] * prompts)
    plan = StepPlan(1, ints(range(prompts)), ints([0] * prompts), ints(many), wants, ints())
    inputs = worker._prepare(plan, None, whole=False)

    def run(times: int) -> None:
        for _ in range(times):
            worker._compute(inputs, None)
        torch.cuda.synchronize()

    return run


def measure(name: str, run: Callable[[int], None], times: int = 20) -> None:
    run(3)
    found = []
    for _ in range(3):
        started, stopped = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        run(times)
        stopped.record()
        torch.cuda.synchronize()
        found.append(started.elapsed_time(stopped) / times)
    print(f"\n{name}: {statistics.median(found):.3f} ms")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(5)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name[:60]].append(event.device_time)
    for kernel, each in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        print(f"  {kernel:60} {len(each) // 5:4} × {statistics.mean(each):7.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--prompts", type=int, default=0)
    args = parser.parse_args()
    worker, graphs = prepare(args.folder, args.rows, args.context, args.prompts)
    with torch.inference_mode():
        for rows in args.rows:
            measure(f"{rows} rows", partial(replay, worker, graphs, rows, args.context))
        if args.prompts:
            name = f"{args.prompts} prompts of {PROMPT} tokens"
            measure(name, prefill(worker, args.prompts), times=4)


if __name__ == "__main__":
    main()
