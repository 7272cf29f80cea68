"""``manta serve`` on two hosts with addresses of their own (tests/support/hosts.py).

python -m tests.soak.serve_hosts (as root). A server with an engine and an ingress replica on each
host is asked through either host's HAProxy; then, under running streams, the second host's node is
drained as before a spot instance goes, and ends; it comes again, and the cable is pulled out, and
put back. Streams through the first host go on to their ends, with the text of the undisturbed run.
"""

import workers  # noqa: F401, I001  # before torch

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.directory import Directory, Kind
from deploy.haproxy import HOST_TIMEOUT
from deploy.http_stream import HttpClient
from tests.support.hosts import HOSTS, OTHER, pull_cable, run_on_head, start_node
from tests.support.served import Served, serve

STREAMS = 16
OK = "status 200"
NOTICE = 60  # seconds from a spot notice to the node's end

Answer = tuple[str, float, str]  # how it ended, after how many seconds, and its text


async def ask(url: str, tokens: int, seed: int) -> Answer:
    """A streamed completion."""
    body = {
        "model": "manta-demo", "prompt": f"{seed}, this is the story of", "max_tokens": tokens,
        "ignore_eos": True, "stream": True, "seed": seed,
    }  # fmt: skip
    events: list[bytes] = []
    begun = time.monotonic()
    try:
        answer = await asyncio.wait_for(
            HttpClient(url).request(
                "POST", "/v1/completions", json.dumps(body).encode(), lambda e, _: events.append(e)
            ),
            timeout=60,
        )
        end = f"status {answer.status}"
        if events and events[-1] != b"[DONE]":
            end = f"the stream stops at {events[-1]!r}"
        elif len(events) > 1 and b'"error"' in events[-2]:
            end = json.loads(events[-2])["error"]["message"]
    except OSError as error:
        end = f"{type(error).__name__}: {error}"
    took = time.monotonic() - begun
    said = [json.loads(event) for event in events if event.startswith(b"{")]
    text = "".join(one["choices"][0]["text"] for one in said if one.get("choices"))
    return end, took, text


async def together(url: str, tokens: int) -> list[Answer]:
    """Some streams at once; prints how they ended, and after how many seconds."""
    answers = await asyncio.gather(*(ask(url, tokens, i) for i in range(STREAMS)))
    for end, count in Counter(end for end, _, _ in answers).items():
        seconds = [after for this, after, _ in answers if this == end]
        print(f"  {count} streams: {end} ({min(seconds):.2f} to {max(seconds):.2f} s)", flush=True)
    return answers


async def answered(url: str) -> dict[str, int]:
    """Requests answered, by engine."""
    text = (await HttpClient(url).request("GET", "/metrics")).body.decode()
    count: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith("manta:request_success_total{"):
            count[line.split('engine="')[1].split('"')[0]] += int(float(line.split()[-1]))
    return dict(count)


async def watch(url: str, seconds: float) -> None:
    """A request every two seconds, that must be answered; prints when it began and ended."""

    async def one(after: float) -> None:
        await asyncio.sleep(after)
        end, took, _ = await ask(url, 5, 1)
        print(f"  {after:5.1f} s: {end} after {took:.2f} s", flush=True)
        assert end == OK

    begun = time.monotonic()
    requests = [asyncio.create_task(one(2.0 * i)) for i in range(int(seconds / 2))]
    there = where()
    while not all(request.done() for request in requests):
        if there != where():
            there = where()
            print(f"  {time.monotonic() - begun:5.1f} s: engines {there}", flush=True)
        await asyncio.sleep(0.1)
    await asyncio.gather(*requests)


def where(kind: Kind = "engine") -> dict[str, str]:
    """The host of each."""
    return {id: a.split()[0] for id, a in Directory("manta").find(kind).items()}


def as_undisturbed(pairs: list[tuple[Answer, Answer]]) -> None:
    """Compare answers with those of the undisturbed run."""
    assert pairs and all(found[::2] == wanted[::2] for found, wanted in pairs)
    print(f"  {len(pairs)} went on to their ends, with the text of the undisturbed run")


@contextmanager
def second_node(folder: str) -> Iterator[None]:
    """Its node, started anew."""
    node = start_node(OTHER, folder)
    try:
        while sum(one["Alive"] for one in ray.nodes()) < 2:  # type: ignore[no-untyped-call]
            time.sleep(0.1)
        yield
    finally:
        node.terminate()
        node.wait(60)


async def undisturbed(served: Served) -> list[Answer]:
    """Engines and ingress replicas are on both hosts, and answer there."""
    while len(where()) < 2:
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)  # every ingress replica has looked
    print("engines:", where(), "ingress:", where("ingress"))
    assert sorted(where().values()) == sorted(where("ingress").values()) == sorted(HOSTS.values())
    for name, address in HOSTS.items():
        print(f"asked at {name}:")
        answers = await together(f"http://{address}:{served.port}", 60)
        assert {end for end, _, _ in answers} == {OK}
    print("answered, by engine:", await answered(served.url))
    print("undisturbed:")
    return await together(served.url, 1500)


async def drain(served: Served) -> None:
    """The second node gets a spot notice under running streams, and ends."""
    expected = await undisturbed(served)
    print(f"The second node is drained; it ends {NOTICE} s later:")
    streams = asyncio.create_task(together(served.url, 1500))
    await asyncio.sleep(1.0)
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    (node,) = (node for node in nodes if node["NodeManagerAddress"] == HOSTS[OTHER])
    told = time.monotonic()
    await asyncio.to_thread(
        subprocess.run,
        [f"{os.path.dirname(sys.executable)}/ray", "drain-node", f"--node-id={node['NodeID']}",
         "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot",
         f"--deadline-remaining-seconds={NOTICE}"],
        check=True,
    )  # fmt: skip
    print(f"  the notice is given after {time.monotonic() - told:.1f} s")
    while HOSTS[OTHER] in where().values():
        assert time.monotonic() - told < NOTICE
        await asyncio.sleep(0.1)
    print(f"  the engine has left it after {time.monotonic() - told:.1f} s")
    await watch(served.url, NOTICE + told - time.monotonic())
    os.kill(int(os.environ["NODE_B"]), signal.SIGTERM)
    await watch(served.url, 20)
    as_undisturbed(list(zip(await streams, expected, strict=True)))


async def pull(served: Served, folder: str) -> None:
    """The second host is cut off under running streams."""
    expected = await undisturbed(served)
    print("The cable is pulled out:")
    streams = asyncio.create_task(together(served.url, 1500))
    await asyncio.sleep(1.0)
    pull_cable()
    await watch(served.url, 60)
    answers = await streams
    broken = [took for end, took, _ in answers if end != OK]
    assert 0 < max(broken) < 1.0 + HOST_TIMEOUT + 2
    as_undisturbed([pair for pair in zip(answers, expected, strict=True) if pair[0][0] == OK])
    print("It is put back, and the second host's node started anew:")
    pull_cable(out=False)
    with second_node(folder):
        await watch(served.url, 30)
        print("answered, by engine:", await answered(served.url))


def main(folder: str) -> None:
    """What the driver does, on the first host."""
    ray.init(log_to_driver=False)
    options = "--num-replicas", "2", "--num-ingress-replicas", "2"
    with serve(*options) as served:
        asyncio.run(drain(served))
    with second_node(folder), serve(*options) as served:
        asyncio.run(pull(served, folder))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        sys.exit(run_on_head("tests.soak.serve_hosts"))
