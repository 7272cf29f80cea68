"""A soak of ``manta serve``: many streams, clients that vanish at random, nothing may leak.

    python -m tests.soak.server [--seconds 120] [--streams 64]

It starts a server with the embedded model and few KV blocks, so that requests are preempted, and
keeps ``--streams`` clients busy: chats and completions, streamed and whole, with a seed each.
Every third client goes away at a random moment: while it waits, in the middle of its answer. Then
it checks that

- every completed answer has the tokens that the offline engine gives for the same seed;
- when the clients are gone no request, block, connection or file is left;
- open files, threads and memory of every process stayed where they were.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.processes import memory_bytes, num_threads, open_files, title, tree
from deploy.http_stream import HttpClient
from tests.support.served import Served, serve

MODEL = "manta-demo"
PROMPTS = [
    "Hello, my name is", "The capital of France is", "Once upon a time", "Tell me a joke.",
    "What is manta?", "One, two, three, four", "The future of AI is", "My favourite animal is",
]  # fmt: skip
VARIANTS = 64  # different requests; each comes many times, in ever other company
VANISHING = 1 / 3
KV_BLOCKS = 160  # 48 sequences of some ten blocks would need three times as many
OPTIONS = [
    "--max-num-seqs", "48", "--num-gpu-blocks-override", str(KV_BLOCKS), "--swap-space", "0.02",
]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One request, as a chat or a completion."""

    prompt: str
    chat: bool
    temperature: float
    max_tokens: int
    ignore_eos: bool
    seed: int

    def body(self, stream: bool) -> bytes:
        """The request's JSON."""
        body: dict[str, Any] = {
            "model": MODEL, "temperature": self.temperature, "seed": self.seed,
            "max_tokens": self.max_tokens, "ignore_eos": self.ignore_eos, "stream": stream,
            "return_token_ids": True,
        }  # fmt: skip
        if self.chat:
            body["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            body["prompt"] = self.prompt
        return json.dumps(body).encode()


def variants() -> list[Variant]:
    """The requests of every soak, the same ones each time."""
    draw = random.Random(7)
    return [
        Variant(
            prompt=" ".join(draw.choices(PROMPTS, k=draw.choice([1, 1, 2, 12]))),
            chat=draw.random() < 0.5,
            temperature=draw.choice([0.0, 0.8, 1.0, 1.5]),
            max_tokens=draw.choice([1, 20, 100, 300]),
            ignore_eos=draw.random() < 0.7,
            seed=draw.randrange(2**31),
        )
        for _ in range(VARIANTS)
    ]


@dataclass
class Footprint:
    """What a server's processes hold, by process."""

    names: dict[int, str] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)
    threads: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, served: Served) -> "Footprint":
        """The footprint now."""
        found = cls()
        for pid in tree(served.process.pid):
            try:
                memory, files, threads = memory_bytes(pid), open_files(pid), num_threads(pid)
            except OSError:
                continue  # it has ended
            found.names[pid] = title(pid)
            found.memory[pid], found.files[pid], found.threads[pid] = memory, files, threads
        return found


@dataclass
class Soak:
    """What came of a soak. ``answers`` are the token ids of each completed answer."""

    answers: list[tuple[Variant, tuple[int, ...]]] = field(default_factory=list)
    vanished: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    footprints: list[Footprint] = field(default_factory=list)
    load: dict[str, Any] = field(default_factory=dict)
    preemptions: float = 0.0  # since the server started


def token_ids(events: list[bytes], body: bytes) -> tuple[int, ...]:
    """The output's tokens, of a stream or of a whole answer."""
    ids: list[int] = []
    for data in events or [body]:
        if data == b"[DONE]":
            continue
        for choice in json.loads(data)["choices"]:
            ids += choice.get("token_ids") or []
    return tuple(ids)


async def soak(
    served: Served,
    seconds: float,
    streams: int,
    seed: int = 0,
    vanishing: float = VANISHING,
    least: int = 0,
) -> Soak:
    """Load a server until the time is over and ``least`` answers have come, and look at it
    afterwards, when it is idle again."""
    found, client, draw = Soak(), HttpClient(served.url), random.Random(seed)
    pool = variants()
    end = time.monotonic() + seconds

    async def ask(variant: Variant, stream: bool, patience: float | None) -> None:
        events: list[bytes] = []
        path = "/v1/chat/completions" if variant.chat else "/v1/completions"
        request = client.request(
            "POST", path, variant.body(stream), lambda data, at: events.append(data)
        )
        try:
            answer = await asyncio.wait_for(request, patience)
        except TimeoutError:
            found.vanished += 1
            return
        except OSError as error:
            found.errors[repr(error)] += 1
            return
        if failures := [data for data in events if data.startswith(b'{"error"')]:
            found.errors[failures[0].decode()] += 1
        elif answer.status == 200:
            found.answers.append((variant, token_ids(events, answer.body)))
        else:
            found.errors[f"{answer.status}: {answer.body.decode()}"] += 1

    async def one_client() -> None:
        while time.monotonic() < end or (len(found.answers) < least and not found.errors):
            # Most of the vanishing go early; some late, when their answer has begun.
            patience = draw.expovariate(1 / 0.5) if draw.random() < vanishing else None
            await ask(draw.choice(pool), draw.random() < 0.7, patience)

    async def watch() -> None:
        while True:
            await asyncio.sleep(seconds / 12)
            found.footprints.append(Footprint.of(served))

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(one_client() for _ in range(streams)))
    watcher.cancel()
    client.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        answer = await client.request("GET", "/load")
        found.load = json.loads(answer.body)
        client.close()
        if not leftovers(found.load):
            break
    text = (await client.request("GET", "/metrics")).body.decode()
    client.close()
    counts = re.findall(r"^manta:num_preemptions_total.* (\S+)$", text, re.MULTILINE)
    found.preemptions = sum(map(float, counts))
    await asyncio.sleep(1)  # connections that were closed are forgotten
    found.footprints.append(Footprint.of(served))
    return found


def leftovers(load: dict[str, Any]) -> list[str]:
    """What an idle server still holds."""
    left = [f"{load['server_load']} requests in the router"] if load["server_load"] else []
    for engine in load["engines"]:
        for name in ("running", "waiting", "waiting_tokens"):
            if engine[name]:
                left.append(f"{engine[name]} {name}")
        if engine["free_blocks"] != engine["blocks"]:
            left.append(f"{engine['blocks'] - engine['free_blocks']} blocks")
    return left


def growth(found: Soak, before: Footprint, what: str) -> Iterator[tuple[str, int, int]]:
    """(process, before, after) of a figure ``what`` for each process that was there before."""
    after = found.footprints[-1]
    for pid, name in before.names.items():
        values = getattr(after, what)
        if pid in values:
            yield name, getattr(before, what)[pid], values[pid]


def wrong_answers(found: Soak) -> list[tuple[Variant, tuple[int, ...], tuple[int, ...]]]:
    """Completed answers that are not the offline engine's: (request, served, offline)."""
    expected = _expected({variant for variant, _ in found.answers})
    return [(v, ids, expected[v]) for v, ids in found.answers if ids != expected[v]]


_known: dict[Variant, tuple[int, ...]] = {}


def _expected(asked: set[Variant]) -> dict[Variant, tuple[int, ...]]:
    """What the offline engine gives for each request; for each but once in a process."""
    from manta import LLM, SamplingParams

    llm = LLM(use_tqdm_on_load=False) if asked - _known.keys() else None
    for chat in (False, True):
        some = [v for v in asked - _known.keys() if v.chat is chat]
        if llm is None or not some:
            continue
        params = [
            SamplingParams(
                temperature=v.temperature,
                max_tokens=v.max_tokens,
                ignore_eos=v.ignore_eos,
                seed=v.seed,
            )
            for v in some
        ]
        if chat:
            messages = [[{"role": "user", "content": v.prompt}] for v in some]
            outputs = llm.chat(messages, params, use_tqdm=False)
        else:
            outputs = llm.generate([v.prompt for v in some], params, use_tqdm=False)
        for variant, output in zip(some, outputs, strict=True):
            _known[variant] = tuple(output.outputs[0].token_ids)
    return _known


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with serve(*OPTIONS) as served:
        asyncio.run(soak(served, args.seconds / 6, args.streams, args.seed))  # warms up
        before = Footprint.of(served)
        found = asyncio.run(soak(served, args.seconds, args.streams, args.seed + 1))
    left = leftovers(found.load)
    print(
        f"{args.seconds:g} s with {args.streams} streams: {len(found.answers)} answers completed,"
        f" {sum(len(ids) for _, ids in found.answers)} tokens; {found.vanished} clients vanished;"
        f" {sum(found.errors.values())} errors {dict(found.errors)};"
        f" {found.preemptions:g} preemptions"
    )
    print(f"left when idle: {left or 'nothing'}")
    for what in ("files", "threads"):
        for name, then, now in growth(found, before, what):
            if now != then:
                print(f"  {what} of {name}: {then} -> {now}")
    for pid, name in before.names.items():
        if name.startswith("ray::ServeReplica"):
            course = [before, *found.footprints]
            sizes = [round(f.memory[pid] / 2**20) for f in course if pid in f.memory]
            print(f"  MiB of {name} in the course of it: {sizes}", flush=True)
    wrong = wrong_answers(found)
    print(f"answers that differ from the offline engine's: {len(wrong)}")
    for variant, served_ids, ids in wrong[:3]:
        print(f"  {variant}\n    served  {served_ids}\n    offline {ids}")
    return int(bool(wrong or left or found.errors))


if __name__ == "__main__":
    sys.exit(main())
