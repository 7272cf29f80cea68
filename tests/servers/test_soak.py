"""Short soaks: many streams and clients that vanish, or hostile ones. The long ones are ``make
soak-serve`` and ``make soak-hostile``."""

import asyncio
import os

from tests.soak import chaos, hostile
from tests.soak.server import OPTIONS, Footprint, growth, leftovers, soak, wrong_answers
from tests.support.served import gone, serve


def test_nothing_leaks_and_every_answer_is_right() -> None:
    with serve(*OPTIONS) as served:
        asyncio.run(soak(served, 3, 64))  # connections and buffers that stay are made
        before = Footprint.of(served)
        found = asyncio.run(soak(served, 7, 64, seed=1, least=100))
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
    """Two engines, of which one is killed, one drained, and a third comes and leaves; then one that
    is split in two takes their place."""
    os.environ["MANTA_TEST"] = session = f"chaos-{os.getpid()}"
    with serve(*chaos.OPTIONS) as served:
        found = asyncio.run(chaos.soak(served, session, 40, ["kill", "drain", "scale"], 6))
        assert not found.errors and not found.wrong
        assert found.answers > 40 and found.moved > 3

        async def reshape() -> None:
            over = asyncio.Event()
            found, some = chaos.Chaos(), chaos.requests(8, seed=1)
            asking = asyncio.create_task(chaos.ask_all(served.url, some, 4, found, over))
            shape = ("--num-replicas", "1", "--tensor-parallel-size", "2")
            await chaos.manta(served, "scale", *shape)
            ids = await chaos.manta(served, "engines")
            over.set()
            await asking
            assert not found.errors and found.answers and len(ids.splitlines()) == 1

        asyncio.run(reshape())
    gone(session)
