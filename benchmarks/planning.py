"""What planning a step costs, without a model: microseconds per scheduled request.

    python benchmarks/planning.py
    python benchmarks/planning.py --share MODEL [MODEL ...]

Sequences decode, at 16, 256 and 2,048 at once; every step some end and others are admitted in
their place, so that admission, growth and release are among what is measured. ``under pressure``
has a third of the blocks that they come to need, so that some are preempted all the time. Medians
over steps; planning is ``Scheduler.plan``, applying ``Scheduler.apply``. A second table has what a
schedule log adds to a step.

``--share`` runs 32 sequences on a real model instead and gives what planning and applying are of
a step.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.config import EngineConfig  # noqa: E402
from engine.continuation import begin  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.executor import Capacity, ModelFacts  # noqa: E402
from engine.plan import StepPlan, StepResult, ints  # noqa: E402
from engine.preempt import MeasuredCosts  # noqa: E402
from engine.sampling_params import SamplingParams  # noqa: E402
from engine.schedule_log import Header, RecordingExecutor  # noqa: E402

RUNNING = [16, 256, 2048]
BLOCK_SIZE = 16
SHAPES = {False: (256, 128), True: (32, 480)}  # prompt and longest output, by pressure


class NoModel:
    """Gives random tokens at once."""

    steps_ahead, pipelined = 0, False

    def __init__(self) -> None:
        self.draw = np.random.default_rng(0)

    def run(self, plan: StepPlan) -> Any:
        rows = ints(np.flatnonzero(plan.wants))
        tokens = self.draw.integers(0, 30_000, len(rows), dtype=np.int32)
        failed = np.zeros(len(rows), np.bool_)
        self.result = lambda: StepResult(plan.step, rows, tokens, failed, {}, {}, 1e-3)
        return self

    def check(self) -> None:
        pass


class Timed:
    """The scheduler's two verbs, with a stopwatch."""

    def __init__(self, engine: Engine) -> None:
        self.plans: list[float] = []
        self.applies: list[float] = []
        self.rows: list[int] = []
        scheduler = engine.scheduler
        plan, apply = scheduler.plan, scheduler.apply

        def timed_plan() -> StepPlan | None:
            started = time.perf_counter()
            made = plan()
            if made is not None:
                self.plans.append(time.perf_counter() - started)
                self.rows.append(len(made.slots))
            return made

        def timed_apply(result: StepResult) -> Any:
            started = time.perf_counter()
            progress = apply(result)
            self.applies.append(time.perf_counter() - started)
            return progress

        scheduler.plan, scheduler.apply = timed_plan, timed_apply  # type: ignore[method-assign]


def run(running: int, pressure: bool, steps: int) -> None:
    prompt_len, longest = SHAPES[pressure]
    needed = running * (prompt_len + longest) // BLOCK_SIZE
    blocks = max(needed // 3, 40) if pressure else 2 * needed
    config = EngineConfig.from_options(
        max_num_seqs=running, max_num_batched_tokens=max(2048, 8 * running)
    )
    costs = MeasuredCosts(1e-5, 1e-5, 1e-4)
    engine = Engine(
        config, NoModel(), ModelFacts("none", 30_000, 4096, 0, 0, 0.0, "", ""),  # type: ignore
        Capacity(blocks, blocks, BLOCK_SIZE, 1, "none", costs), 4096,
    )  # fmt: skip
    draw, number = random.Random(0), 0

    def add(spread: int) -> None:
        nonlocal number
        prompt = [draw.randrange(30_000) for _ in range(prompt_len)]
        output = draw.randint(1 if spread else longest // 2, longest)
        sampling = SamplingParams(max_tokens=output, seed=0)
        engine.add(begin(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
        number += 1

    for _ in range(running):
        add(1)
    while engine.scheduler.num_waiting and not pressure:
        engine.step()
    timed = Timed(engine)
    for _ in range(steps):
        while engine.num_unfinished < running:
            add(0)
        engine.step()
    half = len(timed.plans) // 4
    per = [(p / r, a / r) for p, a, r in zip(timed.plans, timed.applies, timed.rows, strict=True)]
    plans, applies = zip(*per[half:], strict=True)
    stats = engine.scheduler.stats
    print(
        f"| {running:,}{' under pressure' if pressure else ''} |"
        f" {statistics.median(timed.rows[half:]):.0f} |"
        f" {1e6 * statistics.median(plans):.2f} | {1e6 * statistics.median(applies):.2f} |"
        f" {1e3 * statistics.median(timed.plans[half:]):.2f} |"
        f" {(stats.preemptions_swap + stats.preemptions_recompute) / stats.steps:.2f} |",
        flush=True,
    )


def logged(running: int, steps: int) -> None:
    """What ``--schedule-log`` adds to a step of ``running`` decodes: microseconds and bytes."""
    costs = MeasuredCosts(1e-5, 1e-5, 1e-4)
    capacity = Capacity(1, 1, BLOCK_SIZE, 1, "none", costs)
    facts = ModelFacts("none", 30_000, 4096, 0, 0, 0.0, "", "")
    header = Header({}, EngineConfig(), "", facts, capacity)
    slots = np.arange(running, dtype=np.int32)
    plan = StepPlan(1, slots, 100 * slots, slots, slots * 0 + 1, np.zeros((9, 3), np.int32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        seconds = []
        bare, executor = NoModel(), RecordingExecutor(NoModel(), path, header)  # type: ignore
        for _ in range(steps):
            started = time.perf_counter()
            bare.run(plan).result()
            between = time.perf_counter()
            executor.run(plan).result()
            seconds.append(time.perf_counter() - between - (between - started))
        size = path.stat().st_size / steps
    print(f"| {running:,} | {1e6 * statistics.median(seconds):.0f} | {size:.0f} |")


def share(model: str) -> None:
    from manta import LLM

    llm = LLM(model, dtype="bfloat16", max_model_len=2048, use_tqdm_on_load=False)
    draw = random.Random(0)

    def generate() -> None:
        prompts = [[draw.randrange(10, 15_000) for _ in range(128)] for _ in range(32)]
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        llm.generate(prompts, params, use_tqdm=False)

    generate()
    timed = Timed(llm.engine)
    started = time.perf_counter()
    generate()
    seconds = time.perf_counter() - started
    ours = sum(timed.plans) + sum(timed.applies)
    print(
        f"{Path(model).name}: 32 running, {len(timed.plans)} steps of"
        f" {1e3 * seconds / len(timed.plans):.2f} ms; planning and applying"
        f" {1e6 * ours / len(timed.plans):.0f} us, {100 * ours / seconds:.2f} % of a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--share", nargs="+", metavar="MODEL")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if args.share:
        for model in args.share:
            share(model)
        return
    print("| running | rows | plan, us a row | apply, us a row | plan, ms | preemptions a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for pressure in (False, True):
        for running in RUNNING:
            run(running, pressure, args.steps)
    print("| running | schedule log, us a step | bytes a step |")
    print("| --- | --- | --- |")
    for running in RUNNING:
        logged(running, args.steps)


if __name__ == "__main__":
    main()
