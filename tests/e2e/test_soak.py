"""Short soaks: many streams and clients that vanish, or hostile ones. The long ones are ``make
soak-serve`` and ``make soak-hostile``."""

import asyncio

from tests.soak import hostile
from tests.soak.server import OPTIONS, Footprint, growth, leftovers, soak, wrong_answers
from tests.support.served import serve


def test_nothing_leaks_and_every_answer_is_right() -> None:
    with serve(*OPTIONS) as served:
        asyncio.run(soak(served, 3, 64))  # connections and buffers that stay are made
        before = Footprint.of(served)
        found = asyncio.run(soak(served, 7, 64, seed=1, least=100))
    assert not found.errors
    assert found.vanished > 50
    assert found.preemptions > 0
    assert not leftovers(found.load)
    for what, most in (("files", 16), ("threads", 8), ("memory", 64 << 20)):
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
