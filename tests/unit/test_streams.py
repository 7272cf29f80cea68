"""What an engine says in one breath with its death: queued, begun, and gone."""

import asyncio

import pytest

from cluster.attempts import AttemptTable
from cluster.client import EngineLoad
from cluster.messages import Update
from cluster.streams import Stream
from engine.config import FailoverConfig
from engine.errors import EngineError, Unavailable
from engine.outcome import Outcome
from engine.sequence import FinishReason
from tests.support.streams import request

FULL = [[7, 8, 9]]


class Engine:
    """The client's real table of an engine of which we say what comes; it queues request 0."""

    def __init__(self, *more):
        self.table = AttemptTable(lambda command: None)
        self.more = more

    async def submit(self, request, sink):
        asyncio.get_running_loop().call_soon(self.say)
        return await self.table.submit(request, sink)

    def say(self):
        self.table.receive(Update(accepted=[0], begun=[0]))
        for do in self.more:
            do(self.table)


def lost(table):
    table.fail("it died")


def ended(table):
    table.receive(Update(ended="it is not wanted"))


def gap(table):
    table.receive(Update(completions=[0], positions=[5], tokens=[7]))


def leaves(table):
    table.receive(Update(load=EngineLoad(1, 0, 0, 0, draining=True)))


def whole(table):
    outcome = Outcome(0, 0, FULL[0], finish_reason=FinishReason.LENGTH)
    table.receive(Update(outcomes=[(0, outcome)]))


class Route:
    """Each engine in turn; an error in its place is raised."""

    def __init__(self, *engines):
        self.engines = list(engines)

    async def ready(self, seconds):
        return True

    async def admit(self, request, sink, leaving=False):
        self.last = request
        engine = self.engines.pop(0)
        if isinstance(engine, EngineError):
            raise engine
        return await engine.submit(request, sink)

    def moved(self, cause, seconds):
        pass


async def outcomes_of(*engines, max_failovers=2):
    route = Route(*engines)
    stream = Stream(request("r", max_tokens=3), route, FailoverConfig(max_failovers))
    async with asyncio.timeout(5):
        await stream.start()
        found = [outcome async for outcomes in stream for outcome in outcomes]
    return route, found


def test_an_engine_that_dies_in_the_moment_it_takes_a_request_is_one_death():
    route, found = asyncio.run(outcomes_of(Engine(lost), Engine(whole)))
    assert [outcome.tokens for outcome in found] == FULL
    assert (route.last.deaths, route.last.moves) == (1, 1)


def test_a_request_that_comes_while_no_engine_is_there_waits_for_one():
    away = [Unavailable("it starts", "starting") for _ in range(3)]
    route, found = asyncio.run(outcomes_of(*away, Engine(whole)))
    assert [outcome.tokens for outcome in found] == FULL
    assert (route.last.deaths, route.last.moves) == (0, 0)


@pytest.mark.parametrize(
    ("error", "most"),
    [
        (Unavailable("it starts", "starting"), 0),
        (Unavailable("all shuts down", "draining"), 2),
        (EngineError("there is none of that name"), 2),
    ],
)
def test_it_does_not_wait_where_it_may_not_or_none_will_come(error, most):
    with pytest.raises(EngineError, match=str(error)):
        asyncio.run(outcomes_of(error, Engine(whole), max_failovers=most))


def test_a_request_ends_after_so_many_such_deaths():
    _, found = asyncio.run(outcomes_of(*[Engine(lost) for _ in range(4)]))
    assert [outcome.finish_reason for outcome in found] == [FinishReason.ERROR]


def test_tokens_missing_in_that_moment_are_asked_for_again():
    route, found = asyncio.run(outcomes_of(Engine(gap), Engine(whole)))
    assert [outcome.tokens for outcome in found] == FULL


def test_an_end_without_another_try_is_an_end():
    with pytest.raises(EngineError, match="not wanted"):
        asyncio.run(outcomes_of(Engine(ended), Engine(whole)))


def test_an_engine_that_leaves_in_that_moment_is_left():
    """Its stream asks the next at once, instead of staying to its end."""
    route, found = asyncio.run(outcomes_of(Engine(leaves), Engine(whole)))
    assert [outcome.tokens for outcome in found] == FULL
    assert (route.last.deaths, route.last.moves) == (0, 1)
