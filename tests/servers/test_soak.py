"""Short soaks: many streams and clients that vanish, or hostile ones. The long ones are ``make
soak-serve`` and ``make soak-hostile``."""

import asyncio
import re
import subprocess
import sys

from tests.soak import hostile
from tests.soak.server import OPTIONS, Footprint, growth, leftovers, soak, wrong_answers
from tests.support.served import ROOT, serve
from tests.support.waiting import PATIENCE


def test_nothing_leaks_and_every_answer_is_right() -> None:
    with serve(*OPTIONS) as served:
        asyncio.run(soak(served, 2, 64))  # connections and buffers that stay are made
        before = Footprint.of(served)
        found = asyncio.run(soak(served, 5, 64, seed=1, least=100))
    assert not found.errors
    assert found.vanished > 50
    assert found.preemptions > 0
    assert not leftovers(found.load)
    # HAProxy keeps up to a connection of each stream to an ingress replica for a while.
    for what, most in (("files", 64 + 16), ("threads", 8), ("memory", 64 << 20)):
        for name, then, now in growth(found, before, what):
            assert now - then <= most, (what, name, then, now)
    assert not wrong_answers(found)


def test_hostile_clients_change_nothing_for_the_others() -> None:
    with serve(*hostile.OPTIONS) as served:
        found, hostility = asyncio.run(hostile.both(served, 10, 20, 100, least=20))
    assert not hostile.problems(found, hostility)
    assert not wrong_answers(found)
    kinds = {kind for kind, _ in hostility.outcomes}
    assert len(kinds) > 15, kinds


def test_failures_lose_nothing() -> None:
    """One of two engines is killed, one drained, and then two that are split take their place, of
    which one loses a worker; requests come through OpenAI's client and a handle."""
    events = ["kill", "drain", "reshape", "worker"]
    sizes = ["--requests", "12", "--streams", "4", "--order", *events]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.chaos", *sizes],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    (line,) = [line for line in done.stdout.splitlines() if " answers to 12 requests over " in line]
    found = re.search(r"(\d+) answers .*: 0 lost, 0 changed, .*; (\d+) moves;", line)
    assert found is not None, line
    assert int(found[1]) > 12 and int(found[2]) > 1, line
