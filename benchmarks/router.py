"""What the router costs for each token: its CPU time, without an engine's.

An engine that computes nothing gives every stream a token each INTERVAL seconds, through the same
``AttemptTable`` that real engines' tokens arrive in; a client in a process of its own reads the
streams from bare sockets. What is measured is the CPU time of the server's process.

    python -m benchmarks.router [--streams 64] [--tokens 256] [--interval 0.005] [--chat]
"""

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import pstats
import time
from typing import Any

import uvicorn
import uvloop

from cluster.attempts import Attempt, AttemptTable
from cluster.client import EngineInfo, EngineLoad, Sink
from cluster.messages import Cancel, StopAtText, Submit, Times, Update
from deploy.cli import EMBEDDED_MODEL
from engine.continuation import Continuation
from engine.outcome import Outcome
from engine.sampling_params import SamplingParams
from engine.sequence import FinishReason
from engine.stats import Metric
from router.app import build_app
from router.config import RouterConfig
from workers.checkpoint import resolve


class IdleEngine:
    """An ``EngineClient`` that gives each stream a token every ``interval`` seconds."""

    healthy = True
    load = EngineLoad(0, 0, 0, 1 << 20)

    def __init__(self, tokenizer: str, interval: float, texts: list[int]) -> None:
        self.info = EngineInfo(
            engine_id="idle",
            model=EMBEDDED_MODEL,
            tokenizer=tokenizer,
            revision=None,
            chat_template=None,
            max_model_len=1 << 20,
            vocab_size=4096,
            max_logprobs=20,
            block_size=16,
            num_device_blocks=1 << 20,
            num_cpu_blocks=0,
            scheduling_policy="fcfs",
            default_sampling=SamplingParams(),
        )
        self._table = AttemptTable(self._take)
        self._interval = interval
        self._texts = texts
        self._left: dict[int, int] = {}
        self._given: dict[int, int] = {}
        self._new: list[int] = []

    def _take(self, command: Any) -> None:
        if isinstance(command, Submit):
            self._left[command.number] = command.request.sampling.max_tokens or 16
            self._given[command.number] = 0
            self._new.append(command.number)
        elif isinstance(command, Cancel | StopAtText):
            self._left.pop(command.number, None)

    async def submit(self, request: Continuation, sink: Sink) -> Attempt:
        return await self._table.submit(request, sink)

    async def stats(self) -> list[Metric]:
        return []

    async def close(self) -> None: ...

    async def run(self) -> None:
        step = 0
        while True:
            await asyncio.sleep(self._interval)
            step += 1
            update = Update(accepted=self._new)
            update.times = [Times(number, 0.0, 0.0, None, 0, []) for number in self._new]
            self._new = []
            for number in list(self._left):
                self._left[number] -= 1
                token = self._texts[(number + step) % len(self._texts)]
                if self._left[number]:
                    update.completions.append(number)
                    update.positions.append(self._given[number])
                    update.tokens.append(token)
                    self._given[number] += 1
                else:
                    del self._left[number]
                    end = Outcome(0, self._given.pop(number), [token])
                    end.finish_reason = FinishReason.LENGTH
                    update.outcomes.append((number, end))
            self._table.receive(update)


def read_streams(port: int, path: str, body: dict[str, Any], streams: int) -> None:
    """Read streams until all are at their end."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = json.dumps(body).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        end = b""
        while not end.endswith(b"0\r\n\r\n"):
            end = (end + await reader.read(1 << 16))[-64:]
        writer.close()

    async def run() -> None:
        await asyncio.gather(*(one() for _ in range(streams)))

    asyncio.run(run())


async def main(args: argparse.Namespace) -> None:
    tokenizer = str(resolve(EMBEDDED_MODEL, None, "auto"))
    from engine.tokenizer import Tokenizer

    texts = Tokenizer.load(tokenizer).encode("The capital of France is Paris. " * 4)
    engine = IdleEngine(tokenizer, args.interval, texts)
    app = build_app(RouterConfig(), [engine])
    config = uvicorn.Config(app, port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    running = asyncio.create_task(engine.run())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    body: dict[str, Any] = {"max_tokens": args.tokens, "stream": True}
    path = "/v1/chat/completions" if args.chat else "/v1/completions"
    if args.chat:
        body["messages"] = [{"role": "user", "content": "Tell me a joke."}]
    else:
        body["prompt"] = "The capital of France is"
    start = multiprocessing.get_context("spawn")
    for round_ in range(args.rounds + 1):
        client = start.Process(target=read_streams, args=(port, path, body, args.streams))
        client.start()
        while not engine._left:
            await asyncio.sleep(0.001)
        profile = cProfile.Profile()
        if args.profile and round_ == args.rounds:
            profile.enable()
        wall, cpu = time.perf_counter(), time.process_time()
        while engine._left or engine._new:
            await asyncio.sleep(0.01)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        profile.disable()
        await asyncio.to_thread(client.join)
        tokens = args.streams * args.tokens
        if round_:
            print(
                f"{args.streams} streams x {args.tokens} tokens: {tokens / wall:,.0f} tokens/s,"
                f" {1e6 * cpu / tokens:.1f} us of CPU a token"
            )
        if args.profile and round_ == args.rounds:
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    running.cancel()
    server.should_exit = True
    await serving


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--interval", type=float, default=0.005)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--profile", action="store_true")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as in Ray's actors
        runner.run(main(parser.parse_args()))
