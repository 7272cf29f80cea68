"""The scheduler under a random load, driven through the simulated executor.

    python -m tests.soak.scheduler [--requests 100000] [--seed 0] [--deaths 0.004] [--moves 0.02]

Each run draws its own sizes: blocks, slots, pipeline stages, policy and preemption mode. Requests
come in bursts, of mixed lengths, some with a common beginning, with n from 1 to 4, priorities,
clients, deadlines, and cancellation at any moment. The executor dies now and then, before a step or
with the steps in flight, and requests leave and come again as continuations. A third
of the requests have a grammar, which forces tokens. Checked of every request: it ends with exactly
its tokens, or, cancelled, with the first of them; that no row read a wrong or stale block (the
executor looks at every one); that both pools are empty at the end; and that nothing starved.
"""

import argparse
import random
import time
from dataclasses import dataclass, replace
from typing import Any

from engine import scheduler as scheduler_module
from engine.config import EngineConfig
from engine.continuation import Continuation, begin, child_seed
from engine.engine import Engine
from engine.plan import StepPlan
from engine.preempt import MeasuredCosts
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from tests.support.simulator import VOCAB, SimulatedExecutor, extend, next_token

MODES = ["auto", "swap", "recompute"]
POLICIES = ["fcfs", "priority", "fair"]
AGEING_SECONDS = 0.02  # a run takes seconds, not hours: priorities age accordingly
OUTSTANDING = 250  # requests that are in the engine at most
# Steps. All that may be ahead of a request: OUTSTANDING times 1.4 completions of 60 tokens, of
# which a pipeline of 4 stages with 16 slots runs 4 in a step, and blocks may allow but half.
LONGEST_WAIT = 12_000
GRAMMAR = StructuredOutputsParams(choice=["a"])  # of which the simulated workers know only that


@dataclass
class Tally:
    """What a run, or several, did."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    deaths: int = 0
    moves: int = 0
    moved_tokens: int = 0
    forced_tokens: int = 0  # that went to the workers
    steps: int = 0
    tokens: int = 0  # that somebody got
    planned_tokens: int = 0
    recomputed_tokens: int = 0
    swaps: int = 0
    recomputes: int = 0
    prefix_hits: int = 0
    promoted_blocks: int = 0
    kept_states: int = 0
    longest_wait: int = 0  # steps from a request's arrival to its first token
    longest_gap: int = 0  # steps between two tokens of a completion
    seconds: float = 0.0

    def add(self, other: "Tally") -> None:
        for name, value in vars(other).items():
            mine = getattr(self, name)
            longest = name.startswith("longest")
            setattr(self, name, max(mine, value) if longest else mine + value)


@dataclass
class _Open:
    """A request that is under way."""

    request: Continuation
    seed: int
    arrived: int  # the step
    born: float  # in seconds of ``time.monotonic``
    chains: list[int]
    tokens: list[list[int]]  # so far, of each completion
    last: list[int]  # the step of the last one
    ended: list[bool]
    unfinished: int
    cancelled: bool = False
    failed: bool = False


class Load:
    """One run of ``num_requests`` on an engine with sizes drawn from ``seed``.

    spoilt: the share of steps whose keys and values are not finite. Requests that had to do with
    one end with an error, and nothing of it stays in the prefix cache. (Then none is cancelled:
    of what a cancelled one has computed nobody hears.)
    states: the model keeps a state of each sequence.
    deaths: the share of steps with which the executor dies; moves: that of steps before which some
    requests leave the engine, and come again with what they have.
    """

    def __init__(
        self,
        seed: int,
        num_requests: int,
        spoilt: float = 0.0,
        deaths: float = 0.0,
        moves: float = 0.0,
        states: bool = False,
    ) -> None:
        self.spoilt, self.deaths, self.moves = spoilt, deaths, moves
        self.draw = draw = random.Random(seed)
        self.left = num_requests
        self.tally = Tally()
        self.open: dict[str, _Open] = {}
        self.stages = 1 + seed % 4
        self.pipelined = self.stages > 1 and draw.random() < 0.75
        self.mode = MODES[seed // 4 % 3]
        self.policy = draw.choice(POLICIES)
        block_size = draw.choice([4, 8, 16])
        num_slots = draw.choice([16, 48, 96])
        self.max_model_len = 256
        needed = num_slots * 70 // block_size  # what as many average requests take
        num_blocks = max(self.max_model_len // block_size, int(needed * draw.uniform(0.2, 0.6)))
        num_cpu_blocks = int(num_blocks * draw.choice([0, 0.5, 2, 4]))
        self.config = EngineConfig.from_options(
            max_num_seqs=num_slots, max_num_batched_tokens=draw.choice([128, 256, 512]),
            scheduling_policy=self.policy, preemption_mode=self.mode,
            enable_prefix_caching=draw.random() < 0.85,
            max_failovers=1000,  # no request is to blame
            mamba_block_size=draw.choice([None, 2 * block_size]),
        )  # fmt: skip
        costs = MeasuredCosts(1e-5, 1e-5, 10 ** draw.uniform(-6.5, -4.5))
        num_states = int(num_slots * draw.uniform(0.3, 4)) if states else 0
        num_cpu_states = int(num_states * draw.choice([0, 0.5, 2]))
        executor = SimulatedExecutor(
            num_blocks, num_cpu_blocks, block_size, num_slots, self.max_model_len, costs,
            self.pipelined, self.stages - 1, most_forced=12,
            num_states=num_states, num_cpu_states=num_cpu_states,
        )  # fmt: skip
        self.engine = Engine(
            self.config, executor, executor.load(), executor.reserve(), self.max_model_len, (VOCAB,)
        )
        self.stems = [self.tokens(draw.randint(8, 40)) for _ in range(8)]
        self.last_admitted, self.admitted = -1, set[int]()
        self.run_plan, executor.run = executor.run, self.watch  # type: ignore[method-assign]

    def tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(VOCAB) for _ in range(count)]

    def watch(self, plan: StepPlan) -> Any:
        """The executor's ``run``; first come is first served."""
        self.tally.forced_tokens += len(plan.told)
        if self.spoilt:
            executor: Any = self.engine.executor
            executor.spoil = self.draw.random() < self.spoilt
        if self.draw.random() < self.deaths:
            self.tally.deaths += 1
            self.last_admitted = -1
            self.run_plan(plan)
            raise OSError("killed")
        if self.policy == "fcfs":
            for admit in plan.admits:
                if len(admit.tokens) == admit.prompt_len and not self.moves:
                    number = int(admit.name.split("/")[0])
                    first = number not in self.admitted
                    assert not first or number >= self.last_admitted, "one was overtaken"
                    self.last_admitted = max(self.last_admitted, number)
                    self.admitted.add(number)
        return self.run_plan(plan)

    def run(self) -> Tally:
        started = time.perf_counter()
        before, scheduler_module.AGEING_SECONDS = scheduler_module.AGEING_SECONDS, AGEING_SECONDS
        try:
            while self.left or self.open:
                self.arrive()
                self.cancel()
                self.move()
                self.step()
        finally:
            scheduler_module.AGEING_SECONDS = before
        self.tally.seconds = time.perf_counter() - started
        self.finish()
        return self.tally

    def arrive(self) -> None:
        draw = self.draw
        if self.open and draw.random() < 0.5:
            return
        for _ in range(min(draw.randint(1, 40), self.left, OUTSTANDING - len(self.open))):
            stem = draw.choice(self.stems) if draw.random() < 0.3 else []
            length = draw.choice([draw.randint(1, 10), draw.randint(1, 30), draw.randint(20, 56)])
            prompt = stem[: draw.randint(0, len(stem))] + self.tokens(length)
            number = self.tally.requests
            request = begin(
                request_id=str(number),
                prompt_token_ids=prompt,
                sampling=SamplingParams(
                    max_tokens=draw.choice([1, draw.randint(1, 20), draw.randint(20, 150)]),
                    seed=number,
                    n=draw.choice([1] * 8 + [2, 4]),
                    structured_outputs=GRAMMAR if number % 3 == 0 else None,
                ),
                priority=draw.randint(-3, 3) if self.policy == "priority" else 0,
                client=draw.choice("abbcccc") if self.policy == "fair" else "",
                timeout=draw.choice([0.0, 0.05, 1.0])
                if draw.random() < 0.03 and not self.spoilt
                else None,
            )
            chain = 0
            for token in prompt:
                chain = extend(chain, token)
            n = request.sampling.n
            self.open[request.request_id] = _Open(
                request, number, self.tally.steps, time.monotonic(), [chain] * n,
                [[] for _ in range(n)], [0] * n, [False] * n, n,
            )  # fmt: skip
            self.engine.add(request)
            self.tally.requests += 1
            self.left -= 1

    def cancel(self) -> None:
        if self.open and self.draw.random() < 0.03 and not self.spoilt:
            request_id = self.draw.choice(list(self.open))
            self.engine.abort(request_id)
            self.tally.cancelled += 1
            del self.open[request_id]

    def move(self) -> None:
        """Some requests leave, and come again as what they are."""
        if self.draw.random() >= self.moves:
            return
        for name in self.draw.sample(sorted(self.open), min(len(self.open), 20)):
            under_way = self.open[name]
            self.engine.abort(name)
            before = under_way.request
            under_way.request = replace(
                before,
                outputs=tuple(
                    None if ended else tuple(tokens)
                    for tokens, ended in zip(under_way.tokens, under_way.ended, strict=True)
                ),
                moves=before.moves + 1,
                age=time.monotonic() - under_way.born,
            )
            self.engine.add(under_way.request)
            self.tally.moves += 1

    def step(self) -> None:
        self.tally.steps += 1
        for request_id, outcome in self.engine.step():
            under_way, i = self.open[request_id], outcome.index
            sampling = under_way.request.sampling
            assert outcome.position == len(under_way.tokens[i]), "some is missing, or comes twice"
            for token in outcome.tokens:
                self.take(under_way, i, token)
            if outcome.finish_reason is None:
                continue
            under_way.unfinished -= 1
            under_way.ended[i] = True
            if outcome.stop_reason == "timeout":
                assert under_way.request.time_left is not None
                under_way.cancelled = True
            elif self.spoilt and outcome.finish_reason == "error":
                under_way.failed = True
            else:
                assert outcome.finish_reason == "length"
                assert len(under_way.tokens[i]) == sampling.max_tokens
            if not under_way.unfinished:
                del self.open[request_id]
                if under_way.failed:
                    self.tally.failed += 1
                elif under_way.cancelled:
                    self.tally.expired += 1
                else:
                    self.tally.finished += 1

    def take(self, under_way: _Open, i: int, token: int) -> None:
        """The next token of a completion: it is the one that was foretold."""
        tally, chain = self.tally, under_way.chains[i]
        assert token == next_token(chain, child_seed(under_way.seed, i)), "a wrong token"
        under_way.chains[i] = extend(chain, token)
        if under_way.tokens[i]:
            tally.longest_gap = max(tally.longest_gap, tally.steps - under_way.last[i])
        else:
            tally.longest_wait = max(tally.longest_wait, tally.steps - under_way.arrived)
        under_way.tokens[i].append(token)
        under_way.last[i] = tally.steps
        tally.tokens += 1

    def finish(self) -> None:
        """Nothing is left anywhere."""
        engine, tally = self.engine, self.tally
        while engine.has_work:  # results of what was cancelled last
            assert not engine.step()
        kv, stats = engine.scheduler.kv, engine.scheduler.stats
        assert kv.device.num_held == kv.cpu.num_held == 0, "a block has leaked"
        restarts = sum(engine.stats.restarts.counts)
        assert restarts == tally.deaths, "the executor found something wrong, and died of it"
        scheduler = engine.scheduler
        assert not scheduler.has_work and not scheduler.running
        assert scheduler.num_waiting == scheduler.waiting_tokens == 0
        assert len(scheduler._free_slots) == self.config.scheduler.max_num_seqs
        assert tally.finished + tally.cancelled + tally.expired + tally.failed == tally.requests
        executor: Any = engine.executor
        pools = [(kv.device, executor.spoilt), (kv.cpu, executor.spoilt_cpu)]
        if kv.states is not None:
            tiers = kv.states.tiers
            assert tiers.device.num_held == tiers.cpu.num_held == 0, "a state has leaked"
            pools.append((tiers.device, executor.spoilt_states))
            pools.append((tiers.cpu, executor.spoilt_cpu_states))
            tally.kept_states = kv.states.kept
        for pool, spoilt in pools:
            pool.check()
            assert not spoilt[list(pool._cached.values())].any(), "cached, but not finite"
        assert tally.longest_wait < LONGEST_WAIT and tally.longest_gap < LONGEST_WAIT, "one starved"
        if self.mode == "recompute":
            assert stats.preemptions_swap == 0
        tally.planned_tokens = stats.planned_tokens
        tally.recomputed_tokens, tally.moved_tokens = stats.recomputed_tokens, stats.moved_tokens
        tally.swaps, tally.recomputes = stats.preemptions_swap, stats.preemptions_recompute
        tally.prefix_hits = kv.stats.prefix_hits
        tally.promoted_blocks = kv.stats.promoted_blocks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deaths", type=float, default=0.004)
    parser.add_argument("--moves", type=float, default=0.02)
    args = parser.parse_args()
    total = Tally()
    for number in range(args.runs):
        requests = -(-args.requests // args.runs)
        load = Load(args.seed + number, requests, deaths=args.deaths, moves=args.moves)
        tally = load.run()
        total.add(tally)
        print(
            f"{number:3}: {load.stages} stages{' pipelined' if load.pipelined else ''},"
            f" {load.mode}, {load.policy}: {tally}", flush=True,
        )  # fmt: skip
    print(f"total: {total}")
    print(
        f"{total.requests / total.seconds:.0f} requests/s, {total.tokens / total.seconds:.0f}"
        f" output tokens/s, {1e6 * total.seconds / total.planned_tokens:.1f} µs a planned token,"
        " the simulated model's own time included"
    )


if __name__ == "__main__":
    main()
