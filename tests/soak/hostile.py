"""A soak of ``manta serve`` under hostile clients, beside 20 ordinary streams.

    python -m tests.soak.hostile [--seconds 120] [--streams 20]

All at once, each from a loopback address of its own, and bounded in count and time:

- connections to HAProxy that are held with half of a request: thousands of each kind;
- connections to the engine's own ports that say nothing, or announce a message of 256 MB;
- requests that would cost far more than they may;
- templates that never end, in requests that the server was told to trust, and checkpoints whose
  config asks for absurd sizes, which ``manta generate`` is to refuse.

Every ordinary answer must come, with the tokens that the offline engine gives; no hostile one may
be answered with a 500; no process may take more memory than ``MOST_MEMORY``.
"""

import argparse
import asyncio
import contextlib
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import memory_bytes, title, tree
from engine.config import EMBEDDED_MODEL
from tests.soak.server import Soak, leftovers, soak, wrong_answers
from tests.support.listeners import listeners
from tests.support.served import ROOT, Served, serve
from workers.checkpoint import EMBEDDED_PATH

OPTIONS = [
    "--max-num-seqs", "48", "--num-gpu-blocks-override", "400", "--swap-space", "0.05",
    "--max-logprobs", "-1", "--trust-request-chat-template", "--no-prefault-kv-cache",
]  # fmt: skip
MOST_MEMORY = 1200 << 20  # bytes of any process: the router's, when many large requests come
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LOOP = "{% for a in range(99999) %}"


@dataclass
class Hostility:
    """What was done, and what came of it: counts by kind of attack and outcome."""

    served: Served
    end: float
    hold: int  # connections of a kind at once
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    memory: Counter[str] = field(default_factory=Counter)  # most bytes, by process

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end

    def count(self, kind: str, outcome: str) -> None:
        self.outcomes[kind, outcome] += 1


# ---- connections ----

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HALVES = {
    "half a header line": b"POST /v1/comp",
    "half a body": POST + b'Content-Length: 100\r\n\r\n{"prompt"',
    "half a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * 17_000,
}


async def hold(found: Hostility, kind: str, port: int, data: bytes, source: str) -> None:
    """Keep ``found.hold`` connections that have sent ``data``, each until it is closed."""

    async def one() -> None:
        while not found.over:
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, local_addr=(source, 0)
                )
            except OSError:
                found.count(kind, "refused")
                await asyncio.sleep(1)
                continue
            try:
                writer.write(data)
                async with asyncio.timeout_at(_loop_time(found.end)):
                    answer = await reader.read(1 << 16)
                    found.count(kind, "answered" if answer else "closed")
            except TimeoutError:
                found.count(kind, "held to the end")
            except OSError:
                found.count(kind, "reset")
            writer.close()
            await asyncio.sleep(1)

    await asyncio.gather(*(one() for _ in range(found.hold)))


def _loop_time(moment: float) -> float:
    return asyncio.get_running_loop().time() + moment - time.monotonic()


async def leave(found: Hostility, source: str) -> None:
    """Connections that send half a chunk and close at once, a few hundred a second."""
    while not found.over:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(
                "127.0.0.1", found.served.port, local_addr=(source, 0)
            )
            writer.write(HALVES["half a chunk"])
            writer.close()
            found.count("half a chunk, and gone", "sent")
        await asyncio.sleep(0.005)


# ---- requests ----


def requests() -> dict[str, tuple[str, bytes]]:
    """Path and body of what costs far more than it may."""
    return {kind: (path, json.dumps(body).encode()) for kind, (path, body) in _bodies().items()}


def _bodies() -> dict[str, tuple[str, dict[str, Any]]]:
    call = {"name": "f", "arguments": "[" * 1000 + "]" * 1000}
    deep = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    plain: dict[str, Any] = {"prompt": "Hello", "max_tokens": 16}
    chats = {
        "ranges in ranges": LOOP * 4 + "x" + "{% endfor %}" * 4,
        "a long string": "{{ ('a' * 10**10) | length }}",
        "doubling": "{% set n = namespace(s='ab') %}"
        "{% for i in range(50) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    }
    hello = [{"role": "user", "content": "Hello"}]
    return {
        "a prompt of 15 MB": (COMPLETIONS, {**plain, "prompt": "hello " * 2_500_000}),
        "15 MB of spaces": (COMPLETIONS, {**plain, "prompt": " " * 15_000_000}),
        "a message of 15 MB": (CHAT, {"messages": [{"role": "user", "content": "a" * 15_000_000}]}),
        "3 million token ids": (COMPLETIONS, {**plain, "prompt": [7] * 3_000_000}),
        "a million bad words": (COMPLETIONS, {**plain, "bad_words": ["abcdef"] * 1_000_000}),
        "the most bad words": (COMPLETIONS, {**plain, "bad_words": ["a b c d e f"] * 1024}),
        "2 million allowed ids": (COMPLETIONS, {**plain, "allowed_token_ids": [7] * 2_000_000}),
        "all allowed ids": (COMPLETIONS, {**plain, "allowed_token_ids": list(range(4096))}),
        "n=128, all logprobs": (COMPLETIONS, {**plain, "n": 128, "logprobs": -1}),
        "all logprobs": (COMPLETIONS, {**plain, "max_tokens": 50, "logprobs": -1}),
        "n=128, logprobs": (COMPLETIONS, {**plain, "n": 128, "logprobs": 20}),
        "all prompt logprobs": (COMPLETIONS, {**plain, "prompt": [7] * 200, "prompt_logprobs": -1}),
        "3 million tokens back": ("/detokenize", {"tokens": [7] * 3_000_000}),
        "65,536 tokens back": ("/detokenize", {"tokens": [7] * 65_536}),
        "15 MB to tokens": ("/tokenize", {"prompt": "x" * 15_000_000}),
        "deep arguments": (CHAT, {"messages": [*hello, deep]}),
        **{
            f"a template: {name}": (CHAT, {"messages": hello, "chat_template": template})
            for name, template in chats.items()
        },
    }  # fmt: skip


async def ask(
    found: Hostility, known: dict[str, tuple[str, bytes]], first: int, source: str
) -> None:
    """Send these requests in turn, again and again, from the ``first`` on."""
    kinds = list(known)
    while not found.over:
        kind = kinds[first % len(kinds)]
        found.count(kind, await _status(found, *known[kind], source))
        first += 1


async def _status(found: Hostility, path: str, body: bytes, source: str) -> str:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", found.served.port, local_addr=(source, 0)
    )
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()
        while await reader.read(1 << 20):
            pass
        return status[1].decode() if status else "nothing"
    except OSError as error:
        return type(error).__name__
    finally:
        writer.close()


# ---- checkpoints ----

CONFIGS: dict[str, dict[str, Any]] = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "a vocabulary of 10^30": {"vocab_size": 10**30},
    "a yarn factor of 1e308": {"rope_scaling": {"rope_type": "yarn", "factor": 1e308}},
    "sizes over the memory": {
        "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_attention_heads": 1 << 10,
        "num_key_value_heads": 1 << 10, "head_dim": 1 << 10,
    },
}  # fmt: skip


def load_checkpoint(folder: Path, text: str) -> str:
    """What ``manta generate`` says, in one line, of a checkpoint with this config.json."""
    for file in EMBEDDED_PATH.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(text)
    words = ["generate", "--load-format", "dummy", str(folder), "Hello"]
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stderr.strip().splitlines()
    refused = done.returncode != 0 and "Traceback" not in done.stderr
    return "refused" if refused else f"not refused: {lines[-1] if lines else done.returncode}"


async def load_checkpoints(found: Hostility) -> None:
    plain = json.loads((EMBEDDED_PATH / "config.json").read_text())
    texts = {name: json.dumps(plain | fields) for name, fields in CONFIGS.items()}
    texts["100,000 levels of JSON"] = '{"a":' * 100_000 + "1" + "}" * 100_000
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            outcome = await asyncio.to_thread(load_checkpoint, Path(folder), text)
            found.count(f"a checkpoint: {name}", outcome)


# ---- all of it ----


async def watch(found: Hostility) -> None:
    """The most memory of each process of the server."""
    while not found.over:
        for pid in await asyncio.to_thread(tree, found.served.process.pid):
            with contextlib.suppress(OSError):
                name = title(pid)
                found.memory[name] = max(found.memory[name], memory_bytes(pid))
        await asyncio.sleep(0.5)


async def attack(served: Served, seconds: float, held: int) -> Hostility:
    """Everything hostile, until the time is over. ``held``: connections of each kind at once."""
    found = Hostility(served, time.monotonic() + seconds, held)
    engines = {one.port for one in listeners(served.process.pid) if one.process.endswith(":Engine")}
    known = requests()
    work: list[Awaitable[None]] = [
        watch(found),
        leave(found, "127.0.0.40"),
        load_checkpoints(found),
    ]
    for number, (kind, data) in enumerate(HALVES.items()):
        work.append(hold(found, kind, served.port, data, f"127.0.0.{50 + number}"))
    ports = Hostility(served, found.end, min(held, 200), found.outcomes)
    for port in sorted(engines):
        for name, data in (
            ("silent", b""),
            ("256 MB announced", struct.pack("<I", 1 << 28) + b"x" * 1000),
        ):
            work.append(hold(ports, f"a port of the engine: {name}", port, data, "127.0.0.60"))
    for number in range(4):
        work.append(ask(found, known, number * 5, f"127.0.0.{70 + number}"))
    await asyncio.gather(*work)
    return found


async def both(served: Served, seconds: float, streams: int, held: int) -> tuple[Soak, Hostility]:
    """Ordinary streams, and everything hostile beside them."""
    ordinary = soak(served, seconds, streams, vanishing=0.0)
    return await asyncio.gather(ordinary, attack(served, seconds, held))


def problems(found: Soak, hostility: Hostility) -> list[str]:
    """What was not as it must be, beside wrong answers."""
    wrong = [f"an ordinary request: {error}" for error in found.errors]
    wrong += leftovers(found.load)
    for (kind, outcome), count in hostility.outcomes.items():
        if outcome.startswith(("500", "not refused", "nothing")):
            wrong.append(f"{kind}: {count} times {outcome}")
    for name, most in hostility.memory.items():
        if most > MOST_MEMORY:
            wrong.append(f"{name} took {most >> 20} MiB")
    return wrong


def report(found: Soak, hostility: Hostility, say: Callable[[str], None] = print) -> None:
    """The tables of benchmarks/README.md."""
    tokens = sum(len(ids) for _, ids in found.answers)
    say(f"{len(found.answers)} ordinary answers, {tokens} tokens, {len(found.errors)} errors")
    say("| what was done | what came of it, times |\n| --- | --- |")
    kinds = dict.fromkeys(kind for kind, _ in hostility.outcomes)
    for kind in kinds:
        outcomes = {o: n for (k, o), n in sorted(hostility.outcomes.items()) if k == kind}
        say(f"| {kind} | {', '.join(f'{o}: {n:,}' for o, n in outcomes.items())} |")
    say("| process | most memory, MiB |\n| --- | --- |")
    for name, most in hostility.memory.most_common(6):
        say(f"| {name} | {most >> 20} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--held", type=int, default=1500, help="connections of each kind at once")
    args = parser.parse_args()
    with serve(*OPTIONS, model=EMBEDDED_MODEL) as served:
        found, hostility = asyncio.run(both(served, args.seconds, args.streams, args.held))
    report(found, hostility)
    wrong = problems(found, hostility)
    if differing := len(wrong_answers(found)):
        wrong.append(f"{differing} answers differ from the offline engine's")
    print("\n".join(wrong) or "nothing was wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
