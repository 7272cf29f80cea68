"""A soak of failures: engines killed, stopped, drained and reshaped under load; nothing is lost.

    python -m tests.soak.chaos [--requests 1000] [--events 100] [--streams 12]

It starts a server with two engines and two ingress replicas, and an engine with a name, all of the
embedded model, and asks each of its requests once, undisturbed: streams and whole answers through
OpenAI's client, chats and completions, with n, logprobs, stop strings, penalties, sampled with
seeds, and greedy without; and some through a handle. Then it asks them all again, over and over,
while engines, their workers and ingress replicas die (SIGKILL), engines hang (SIGSTOP), are drained
(``manta drain``), come and leave, or are split in two and joined (``manta scale``). Checked: every
answer is in every field what it was; those that are sampled without a seed have, token by token,
the log-probabilities that the model gives to their text; none is an error, but for connections of
an ingress replica that was killed; and at the end no block, request, process or file is left.
"""

import argparse
import asyncio
import importlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

import manta
from cluster.handle import AsyncEngineHandle
from deploy.control import join_server
from deploy.haproxy import STOPPED
from manta import SamplingParams
from tests.soak.server import PROMPTS, leftovers
from tests.support.served import Served, gone, pids, serve
from tests.support.waiting import PATIENCE

OPTIONS = [
    "--num-replicas", "2", "--num-ingress-replicas", "2", "--max-num-seqs", "12",
    "--num-gpu-blocks-override", "300", "--swap-space", "0.05", "--worker-cpus", "0.1",
    "--shutdown-timeout", "120", "--dtype", "float32",
]  # fmt: skip
EVENTS = ("kill",) * 5 + (
    "worker",
    "worker",
    "stop",
    "drain",
    "scale",
    "reshape",
    "ingress",
    "named",
)
NAMED = "chaos"  # the engine with a name
ENGINE, INGRESS, WORKER, ACTOR = ":Engine", ":manta:Router", "ray::RankActor", "EngineActor"
CUT = (openai.APIConnectionError, httpx.TransportError)
TOLERANCE = 1e-3  # of log-probabilities: a model that is split adds up in another order
Answer = tuple[Any, ...]


@dataclass
class Chaos:
    """What came of it."""

    answers: int = 0
    wrong: list[tuple[Any, Any, Any]] = field(default_factory=list)  # asked, found, wanted
    unseeded: list[tuple[list[int], Answer]] = field(default_factory=list)  # prompt, answer
    errors: Counter[str] = field(default_factory=Counter)
    cut: int = 0  # connections that an ingress replica took along, or the last; asked again
    events: Counter[str] = field(default_factory=Counter)
    last: str = "no event"  # number and name of the latest one
    gaps: list[float] = field(default_factory=list)  # the longest of each stream, in seconds
    moved: float = 0.0


def requests(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The requests: arguments of OpenAI's client, or a handle's ``params``, with ``by``, ``stream``
    and ``prompt``."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        asked: dict[str, Any] = {
            "by": draw.choice(["chat"] * 3 + ["completion"] * 4 + ["unseeded"] + ["handle"] * 2),
            "stream": draw.random() < 0.6,
            "prompt": " ".join(draw.choices(PROMPTS, k=draw.choice([1, 2, 12]))),
            "max_tokens": draw.choice([1, 40, 200, 600]),
        }
        found.append(asked)
        if asked["by"] == "unseeded":  # by its tokens, which are needed to look at it again
            asked["prompt"] = [draw.randrange(100, 300) for _ in range(draw.choice([5, 50, 150]))]
            asked |= {"temperature": 1.0, "logprobs": 1, "max_tokens": 200}
            continue
        asked["temperature"] = draw.choice([0, 0.7, 1.0, 1.3])
        if asked["temperature"]:
            asked |= {"seed": number, "n": draw.choice([1, 1, 1, 3])}
            asked |= draw.choice([{}, {}, {"presence_penalty": 1.0}, {"frequency_penalty": 0.5}])
        if draw.random() < 0.3:
            chat = asked["by"] == "chat"
            asked |= {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
        if draw.random() < 0.3:
            asked["stop"] = [draw.choice(["ing", "the ", "a b", "."])]
    return found


@dataclass
class Clients:
    """Those that ask: OpenAI's, and a handle on the engine with a name, if there is one."""

    openai: openai.AsyncOpenAI
    handle: AsyncEngineHandle | None


async def ask(clients: Clients, asked: dict[str, Any], chaos: Chaos) -> Answer:
    """An answer in all that matters: of each choice its text, tokens, log-probabilities and ends,
    and the usage."""
    asked = dict(asked)
    by, stream, prompt = asked.pop("by"), asked.pop("stream"), asked.pop("prompt")
    if by == "handle":
        assert clients.handle is not None
        return await _ask_handle(clients.handle, prompt, SamplingParams(**asked), stream, chaos)
    asked |= {"model": "manta-demo", "extra_body": {"ignore_eos": True, "return_token_ids": True}}
    chat = by == "chat"
    asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    completions = clients.openai.chat.completions if chat else clients.openai.completions
    create: Any = completions.create
    if not stream:
        whole = await create(**asked)
        return _folded([whole], chat, whole.usage)
    chunks, usage, watch = [], None, _Watch()
    async for chunk in await create(**asked, stream=True, stream_options={"include_usage": True}):
        watch.came()
        usage = chunk.usage or usage
        chunks.append(chunk)
    chaos.gaps.append(watch.longest)
    return _folded(chunks, chat, usage)


class _Watch:
    """The longest time between two things."""

    def __init__(self) -> None:
        self.longest, self._last = 0.0, time.monotonic()

    def came(self) -> None:
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now


async def _ask_handle(
    handle: AsyncEngineHandle, prompt: str, params: SamplingParams, stream: bool, chaos: Chaos
) -> Answer:
    texts: dict[int, str] = {}
    tokens: dict[int, list[int]] = {}
    ends: dict[int, tuple[Any, Any]] = {}
    if not stream:
        (output,) = await handle.generate(prompt, params)
        for one in output.outputs:
            texts[one.index], tokens[one.index] = one.text, one.token_ids
            ends[one.index] = one.finish_reason, one.stop_reason
        logprobs = [one.cumulative_logprob for one in output.outputs]
        return texts, tokens, logprobs, ends
    watch = _Watch()
    async for piece in handle.stream(prompt, params):
        watch.came()
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        tokens.setdefault(piece.index, []).extend(piece.token_ids)
        if piece.finish_reason is not None:
            ends[piece.index] = piece.finish_reason, piece.stop_reason
    chaos.gaps.append(watch.longest)
    return texts, tokens, ends


def _folded(parts: list[Any], chat: bool, usage: Any) -> Answer:
    texts: dict[int, list[str]] = {}
    tokens: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    ends: dict[int, tuple[Any, Any]] = {}
    for part in parts:
        for choice in part.choices:
            i = choice.index
            said = getattr(choice, "message", None) or getattr(choice, "delta", None)
            texts.setdefault(i, []).append((said.content if chat else choice.text) or "")
            tokens.setdefault(i, []).extend(getattr(choice, "token_ids", None) or [])
            shown = choice.logprobs
            values = [] if shown is None else (
                [one.logprob for one in shown.content] if chat else shown.token_logprobs
            )  # fmt: skip
            logprobs.setdefault(i, []).extend(values)
            if choice.finish_reason is not None:
                ends[i] = choice.finish_reason, getattr(choice, "stop_reason", None)
    return (
        {i: "".join(found) for i, found in texts.items()},
        tokens,
        logprobs,
        ends,
        (usage.prompt_tokens, usage.completion_tokens),
    )


async def ask_all(
    clients: Clients,
    asked: list[dict[str, Any]],
    streams: int,
    chaos: Chaos,
    until: asyncio.Event | None = None,
) -> list[Answer | None]:
    """Ask every request, ``streams`` at a time; again and again until the event, if there is
    one. The first round's answers."""
    first: list[Answer | None] = [None] * len(asked)
    numbers = iter(range(10**9))

    async def one_client() -> None:
        for number in numbers:
            if (number >= len(asked)) if until is None else until.is_set():
                return
            index = number % len(asked)
            try:
                answer = await ask(clients, asked[index], chaos)
            except (openai.OpenAIError, httpx.TransportError, manta.MantaError) as error:
                gone = isinstance(error, CUT) or STOPPED in str(error)
                if gone and chaos.events["ingress"]:
                    chaos.cut += 1
                else:
                    chaos.errors[f"after {chaos.last}: {repr(error)[:300]}"] += 1
                continue
            chaos.answers += 1
            if asked[index]["by"] == "unseeded":
                chaos.unseeded.append((asked[index]["prompt"], answer))
            elif first[index] is None:
                first[index] = answer
            elif not same(answer, first[index]):
                chaos.wrong.append((asked[index], answer, first[index]))

    await asyncio.gather(*(one_client() for _ in range(streams)))
    return first


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, but for the last digits of log-probabilities."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE * max(1.0, abs(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


async def look_again(clients: Clients, chaos: Chaos) -> None:
    """Compare the log-probabilities of what was sampled without a seed with those that the model
    gives to the same tokens as a prompt."""
    for prompt, (_, tokens, logprobs, *_) in chaos.unseeded:
        again = await clients.openai.completions.create(
            model="manta-demo", prompt=[*prompt, *tokens[0]], max_tokens=1,
            extra_body={"prompt_logprobs": 0},
        )  # fmt: skip
        positions: Any = again.choices[0].prompt_logprobs  # type: ignore[attr-defined]
        wanted = [
            position[str(token)]["logprob"]
            for token, position in zip(tokens[0], positions[len(prompt) :], strict=True)
        ]
        if not same(logprobs[0], wanted):
            chaos.wrong.append((prompt, logprobs[0], wanted))


async def manta_command(served: Served, *words: str) -> str:
    """Run a command of the command line against the server."""
    command = [sys.executable, "-m", "deploy.cli", *words, "--port", str(served.port)]
    run = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


class Harm:
    """Does one harm after the other, each when all is well again."""

    def __init__(self, served: Served, session: str, draw: random.Random, chaos: Chaos) -> None:
        self._served = served
        self._session = session
        self._draw = draw
        self._chaos = chaos
        self._stopped: list[int] = []
        self._ranks = 1

    async def do(self, events: list[str]) -> None:
        for event in events:
            await self.until(lambda admitting: admitting >= 2)
            await asyncio.sleep(self._draw.random() * 2)
            if event == "worker" and self._ranks == 1:
                event = "kill"
            self._chaos.events[event] += 1
            self._chaos.last = f"{sum(self._chaos.events.values())}: {event}"
            print(self._chaos.last, flush=True)
            await getattr(self, f"_{event}")()
        await self.until(lambda admitting: admitting >= 2)
        for pid in self._stopped:
            if pid in pids(self._session, ENGINE):
                os.kill(pid, signal.SIGKILL)

    async def until(self, enough: Callable[[int], bool]) -> None:
        """Wait for a number of engines that take requests."""
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            for _ in _patiently():
                try:
                    load = (await client.get(f"{self._served.url}/load")).json()
                except httpx.TransportError:  # an ingress replica that was killed
                    continue
                if enough(sum(one["healthy"] and not one["draining"] for one in load["engines"])):
                    return
                await asyncio.sleep(0.05)

    async def _kill(self, number: int = signal.SIGKILL) -> int:
        pid = self._draw.choice(
            [pid for pid in pids(self._session, ENGINE) if pid not in self._stopped]
        )
        os.kill(pid, number)
        await self.until(lambda admitting: admitting < 2)  # it is missed
        return pid

    async def _stop(self) -> None:
        self._stopped.append(await self._kill(signal.SIGSTOP))

    async def _worker(self) -> None:
        await self._replace(WORKER, 4)

    async def _ingress(self) -> None:
        await self._replace(INGRESS, 2)

    async def _named(self) -> None:
        await self._replace(ACTOR, 1)

    async def _replace(self, name: str, count: int) -> None:
        """Kill one of those; until there are so many again."""
        killed = self._draw.choice(pids(self._session, name))
        os.kill(killed, signal.SIGKILL)
        for _ in _patiently():
            now = pids(self._session, name)
            if killed not in now and len(now) >= count:
                return
            await asyncio.sleep(0.1)

    async def _drain(self) -> None:
        lines = (await manta_command(self._served, "engines")).splitlines()
        id = self._draw.choice(lines).split()[0]
        await manta_command(self._served, "drain", id, "--timeout", "120")

    async def _scale(self) -> None:
        await manta_command(self._served, "scale", "--num-replicas", "3")
        await manta_command(self._served, "scale", "--num-replicas", "2")

    async def _reshape(self) -> None:
        self._ranks = 3 - self._ranks
        await manta_command(self._served, "scale", "--tensor-parallel-size", str(self._ranks))


def _patiently() -> Iterator[None]:
    deadline = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < deadline, "it has not come to that"
        yield


async def soak(
    served: Served, session: str, count: int, events: list[str], streams: int, seed: int
) -> Chaos:
    """Undisturbed, then disturbed by ``events`` in this order."""
    chaos, asked = Chaos(), requests(count, seed)
    client = openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    )
    clients = Clients(client, await manta.connect_async(NAMED))
    harm = Harm(served, session, random.Random(seed), chaos)
    await harm.until(lambda admitting: admitting >= 2)
    expected = await ask_all(clients, asked, streams, chaos)
    assert not chaos.errors, chaos.errors
    chaos.answers, chaos.gaps, chaos.unseeded = 0, [], []
    over = asyncio.Event()
    asking = asyncio.create_task(ask_all(clients, asked, streams, chaos, over))
    try:
        await harm.do(events)
    finally:
        over.set()
        first = await asking
    chaos.wrong += [
        (one, found, wanted)
        for one, found, wanted in zip(asked, first, expected, strict=True)
        if found is not None and not same(found, wanted)
    ]
    await look_again(clients, chaos)
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        load = (await http.get(f"{served.url}/load")).json()
        deadline = time.monotonic() + 10
        while leftovers(load) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            load = (await http.get(f"{served.url}/load")).json()
        assert not leftovers(load), leftovers(load)
        text = (await http.get(f"{served.url}/metrics")).text
    assert clients.handle is not None
    named = clients.handle.load
    assert not named.running + named.waiting
    await clients.handle.close()
    await client.close()
    lines = [line for line in text.splitlines() if line.startswith("manta:requests_moved_total{")]
    chaos.moved = sum(float(line.rpartition(" ")[2]) for line in lines)
    return chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--order", nargs="+", choices=sorted(set(EVENTS)), help="these instead")
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["MANTA_TEST"] = session = f"chaos-{os.getpid()}"
    draw = random.Random(args.seed)
    events = args.order or [draw.choice(EVENTS) for _ in range(args.events)]
    with serve(*OPTIONS) as served:
        join_server(served.port)
        try:
            manta.start_engine(
                NAMED, "manta-demo", dtype="float32", worker_cpus=0.1, num_gpu_blocks_override=300
            )
            chaos = asyncio.run(
                soak(served, session, args.requests, events, args.streams, args.seed)
            )
            manta.stop_engine(NAMED)
        finally:
            importlib.import_module("ray").shutdown()  # while the server's Ray lives
    gone(session)
    gaps = sorted(chaos.gaps)
    print(
        f"{chaos.answers} answers to {args.requests} requests over {dict(chaos.events)}:"
        f" {sum(chaos.errors.values())} lost, {len(chaos.wrong)} changed,"
        f" {len(chaos.unseeded)} of them without a seed; {chaos.cut} connections cut;"
        f" {chaos.moved:g} moves;"
        f" longest gap of a stream: median {statistics.median(gaps):.2f} s, worst {gaps[-1]:.2f} s"
    )
    for error, times in chaos.errors.most_common(20):
        print(f"  {times} × {error}")
    for asked, found, wanted in chaos.wrong[:3]:
        print(f"  {asked}\n    got    {found}\n    wanted {wanted}")
    return int(bool(chaos.errors or chaos.wrong))


if __name__ == "__main__":
    sys.exit(main())
