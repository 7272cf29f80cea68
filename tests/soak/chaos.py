"""A soak of failures: engines killed, stopped, drained and reshaped under load; nothing is lost.

    python -m tests.soak.chaos [--requests 1000] [--events 100] [--streams 12]

It starts a server with two engines and the embedded model, and asks each of its requests once,
undisturbed: streams and whole answers through OpenAI's client, chats and completions, with n,
logprobs, stop strings, penalties, sampled with seeds and greedy without. Then it asks them all
again, over and over, while engines die (SIGKILL), hang (SIGSTOP), are drained (``manta drain``),
or come and leave (``manta scale``). Checked: every answer is in every field what it was, none is
an error, and at the end no block, request, process or file is left.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from tests.soak.server import PROMPTS, leftovers
from tests.support.served import Served, gone, left_of, serve
from tests.support.waiting import PATIENCE

OPTIONS = [
    "--num-replicas", "2", "--max-num-seqs", "12", "--num-gpu-blocks-override", "300",
    "--swap-space", "0.05", "--worker-cpus", "0.5", "--shutdown-timeout", "120",
]  # fmt: skip
EVENTS = ("kill", "kill", "kill", "stop", "drain", "scale")
Answer = tuple[Any, ...]


@dataclass
class Chaos:
    """What came of it."""

    answers: int = 0
    wrong: list[tuple[dict[str, Any], Answer, Answer]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    gaps: list[float] = field(default_factory=list)  # the longest of each stream, in seconds
    moved: float = 0.0


def requests(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The requests, as arguments of OpenAI's client, with ``chat`` and ``stream``."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        chat, greedy = draw.random() < 0.4, draw.random() < 0.3
        prompt = " ".join(draw.choices(PROMPTS, k=draw.choice([1, 2, 12])))
        asked: dict[str, Any] = {
            "chat": chat,
            "stream": draw.random() < 0.6,
            "model": "manta-demo",
            "max_tokens": draw.choice([1, 40, 200, 600]),
            "temperature": 0 if greedy else draw.choice([0.7, 1.0, 1.3]),
            "extra_body": {"ignore_eos": draw.random() < 0.7, "return_token_ids": True},
        }
        if not greedy:
            asked |= {"seed": number, "n": draw.choice([1, 1, 1, 3])}
            asked |= draw.choice([{}, {}, {"presence_penalty": 1.0}, {"frequency_penalty": 0.5}])
        if draw.random() < 0.3:
            asked |= {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
        if draw.random() < 0.3:
            asked["stop"] = [draw.choice(["ing", "the ", "a b", "."])]
        asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        found.append(asked)
    return found


async def ask(client: openai.AsyncOpenAI, asked: dict[str, Any], chaos: Chaos) -> Answer:
    """An answer in all that matters: of each choice its text, tokens, log-probabilities and ends,
    and the usage."""
    asked = dict(asked)
    chat, stream = asked.pop("chat"), asked.pop("stream")
    create: Any = client.chat.completions.create if chat else client.completions.create
    if not stream:
        whole = await create(**asked)
        return _folded([whole], chat, whole.usage)
    chunks, usage, gap, last = [], None, 0.0, time.monotonic()
    async for chunk in await create(**asked, stream=True, stream_options={"include_usage": True}):
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        usage = chunk.usage or usage
        chunks.append(chunk)
    chaos.gaps.append(gap)
    return _folded(chunks, chat, usage)


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
    url: str, asked: list[dict[str, Any]], streams: int, chaos: Chaos, until: asyncio.Event | None
) -> list[Answer | None]:
    """Ask every request, ``streams`` at a time; again and again until the event, if there is
    one. The first round's answers."""
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    )
    first: list[Answer | None] = [None] * len(asked)
    numbers = iter(range(10**9))

    async def one_client() -> None:
        for number in numbers:
            if (number >= len(asked)) if until is None else until.is_set():
                return
            index = number % len(asked)
            try:
                answer = await ask(client, asked[index], chaos)
            except openai.OpenAIError as error:
                chaos.errors[repr(error)[:300]] += 1
                continue
            chaos.answers += 1
            if first[index] is None:
                first[index] = answer
            elif answer != first[index]:
                chaos.wrong.append((asked[index], answer, first[index]))

    await asyncio.gather(*(one_client() for _ in range(streams)))
    await client.close()
    return first


def engine_pids(session: str) -> list[int]:
    """The processes of the engines."""
    return [int(entry.split()[0]) for entry in left_of(session) if ":Engine" in entry]


async def manta(served: Served, *words: str) -> str:
    """Run a command of the command line against the server."""
    command = [sys.executable, "-m", "deploy.cli", *words, "--port", str(served.port)]
    run = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


async def disturb(
    served: Served, session: str, events: list[str], draw: random.Random, chaos: Chaos
) -> None:
    """Do one harm after the other; each when two engines serve."""
    stopped: list[int] = []
    for event in events:
        await _until(served, lambda admitting: admitting >= 2)
        await asyncio.sleep(draw.random() * 2)
        chaos.events[event] += 1
        pids = [pid for pid in engine_pids(session) if pid not in stopped]
        if event in ("kill", "stop"):
            pid = draw.choice(pids)
            os.kill(pid, signal.SIGKILL if event == "kill" else signal.SIGSTOP)
            stopped += [pid] * (event == "stop")
            await _until(served, lambda admitting: admitting < 2)  # it is missed
        elif event == "drain":
            lines = (await manta(served, "engines")).splitlines()
            await manta(served, "drain", draw.choice(lines).split()[0], "--timeout", "120")
        else:
            await manta(served, "scale", "--num-replicas", "3")
            await manta(served, "scale", "--num-replicas", "2")
    await _until(served, lambda admitting: admitting >= 2)
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def _until(served: Served, enough: Callable[[int], bool]) -> None:
    """Wait for a number of engines that take requests."""
    deadline = time.monotonic() + PATIENCE
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        while True:
            engines = (await client.get(f"{served.url}/load")).json()["engines"]
            if enough(sum(one["healthy"] and not one["draining"] for one in engines)):
                return
            assert time.monotonic() < deadline, engines
            await asyncio.sleep(0.05)


async def soak(
    served: Served, session: str, count: int, events: list[str], streams: int, seed: int = 0
) -> Chaos:
    """Undisturbed, then disturbed by ``events`` in this order."""
    chaos, asked = Chaos(), requests(count, seed)
    await _until(served, lambda admitting: admitting >= 2)
    expected = await ask_all(served.url, asked, streams, chaos, None)
    assert not chaos.errors and None not in expected, chaos.errors
    chaos.answers, chaos.gaps = 0, []
    over = asyncio.Event()
    asking = asyncio.create_task(ask_all(served.url, asked, streams, chaos, over))
    try:
        await disturb(served, session, events, random.Random(seed), chaos)
    finally:
        over.set()
        first = await asking
    chaos.wrong += [
        (one, found, wanted)
        for one, found, wanted in zip(asked, first, expected, strict=True)
        if found is not None and wanted is not None and found != wanted
    ]
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        load = (await client.get(f"{served.url}/load")).json()
        deadline = time.monotonic() + 10
        while leftovers(load) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            load = (await client.get(f"{served.url}/load")).json()
        assert not leftovers(load), leftovers(load)
        text = (await client.get(f"{served.url}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("manta:requests_moved_total{")]
    chaos.moved = sum(float(line.rpartition(" ")[2]) for line in lines)
    return chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["MANTA_TEST"] = session = f"chaos-{os.getpid()}"
    draw = random.Random(args.seed)
    events = [draw.choice(EVENTS) for _ in range(args.events)]
    with serve(*OPTIONS) as served:
        chaos = asyncio.run(soak(served, session, args.requests, events, args.streams, args.seed))
    gone(session)
    gaps = sorted(chaos.gaps)
    print(
        f"{chaos.answers} answers to {args.requests} requests over {dict(chaos.events)}:"
        f" {sum(chaos.errors.values())} lost, {len(chaos.wrong)} changed; {chaos.moved:g} moves;"
        f" longest gap of a stream: median {statistics.median(gaps):.2f} s, worst {gaps[-1]:.2f} s"
    )
    for error, times in chaos.errors.most_common(5):
        print(f"  {times} × {error}")
    for asked, found, wanted in chaos.wrong[:3]:
        print(f"  {asked}\n    got    {found}\n    wanted {wanted}")
    return int(bool(chaos.errors or chaos.wrong))


if __name__ == "__main__":
    sys.exit(main())
