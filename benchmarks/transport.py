"""What a token costs between the engine's loop and a client's reader, in CPU time.

    python benchmarks/transport.py [streams] [tokens of each]

The engine is real but for its model: steps take 5 ms and cost nothing. The engine's own cost of a
token (plan, apply) is measured first, by stepping it without a loop, and is not in the figures.
"""

import asyncio
import multiprocessing
import resource
import sys
import time
from typing import Any

import numpy as np

from cluster.attempts import Attempt
from cluster.client import EngineInfo, Sink
from cluster.loop import EngineLoop
from cluster.streams import Stream
from cluster.transport import RemoteClient, Server
from engine.config import EngineConfig, FailoverConfig
from engine.continuation import Continuation, begin
from engine.engine import Engine
from engine.executor import Capacity, ModelFacts
from engine.plan import StepPlan, StepResult, ints
from engine.preempt import MeasuredCosts
from engine.sampling_params import SamplingParams

STEP_SECONDS = 0.005


class Sleeper:
    """An executor whose model is a clock."""

    steps_ahead, pipelined = 0, False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, plan: StepPlan) -> "Sleeper":
        self.plan = plan
        return self

    def result(self) -> StepResult:
        if self.seconds:
            time.sleep(self.seconds)
        rows = ints(np.flatnonzero(self.plan.wants))
        failed = np.zeros(len(rows), np.bool_)
        return StepResult(self.plan.step, rows, rows + 7, failed, {}, {}, self.seconds)

    def check(self) -> None:
        pass

    def stop(self) -> None:
        pass


class OneEngine:
    """The route to a client's engine."""

    def __init__(self, client: RemoteClient) -> None:
        self._client = client

    async def ready(self, seconds: float) -> bool:
        return True

    async def admit(self, request: Continuation, sink: Sink, leaving: bool = False) -> Attempt:
        return await self._client.submit(request, sink)

    def moved(self, cause: str, seconds: float) -> None: ...


def make_engine(seconds: float) -> Engine:
    config = EngineConfig.from_options()
    facts = ModelFacts("Sleeper", 32000, 4096, 0, 0, 0.0, "none", "none")
    capacity = Capacity(8192, 0, 16, 1, "none", MeasuredCosts(1, 1, 1))
    executor: Any = Sleeper(seconds)
    return Engine(config, executor, facts, capacity, 4096)


def request(number: int, tokens: int) -> Continuation:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return begin(request_id=f"cmpl-{number:032x}", prompt_token_ids=[5] * 32, sampling=sampling)


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def serve(pipe: Any, streams: int, tokens: int) -> None:
    engine = make_engine(0)
    for number in range(streams):
        engine.add(request(number, tokens))
    before = cpu()
    while engine.has_work:
        engine.step()
    bare = cpu() - before
    loop = EngineLoop(make_engine(STEP_SECONDS))
    info = EngineInfo(
        engine_id="e", model="m", tokenizer="t", revision=None, chat_template=None,
        max_model_len=4096, vocab_size=32000, max_logprobs=20, block_size=16,
        num_device_blocks=8192, num_cpu_blocks=0, scheduling_policy="fcfs",
        default_sampling=SamplingParams(),
    )  # fmt: skip
    server = Server(loop, info, "key")
    loop.start()
    pipe.send(server.address)
    pipe.recv()
    before = cpu()
    pipe.send(None)
    pipe.recv()
    pipe.send((bare, cpu() - before))


async def read(pipe: Any, streams: int, tokens: int) -> None:
    client = await RemoteClient.open(pipe.recv())

    async def one(number: int) -> int:
        count = 0
        stream = await Stream(request(number, tokens), OneEngine(client), FailoverConfig()).start()
        async for outcomes in stream:
            count += sum(len(outcome.tokens) for outcome in outcomes)
        return count

    pipe.send(None)
    pipe.recv()
    before, start = cpu(), time.perf_counter()
    counts = await asyncio.gather(*(one(number) for number in range(streams)))
    seconds, mine = time.perf_counter() - start, cpu() - before
    pipe.send(None)
    bare, theirs = pipe.recv()
    total = sum(counts)
    print(f"{streams} streams, {total} tokens, {total / seconds:.0f} tokens/s")
    print(f"engine alone      {bare / total * 1e6:6.1f} us a token")
    print(f"loop and sending  {(theirs - bare) / total * 1e6:6.1f} us a token")
    print(f"client            {mine / total * 1e6:6.1f} us a token")


def main() -> None:
    streams = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, streams, tokens), daemon=True)
    process.start()
    asyncio.run(read(here, streams, tokens))


if __name__ == "__main__":
    main()
