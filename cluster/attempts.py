"""The client's side of one engine: requests that were sent to it, and what comes of them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.client import EngineLoad, Sink
from cluster.messages import Ask, Cancel, Command, Refused, StopAtText, Submit, Times, Update
from engine import errors
from engine.continuation import Continuation
from engine.stats import Metric


class Place(Protocol):
    """What a request takes up at an engine, in the books of whoever chose it."""

    def started(self) -> None:
        """Its first token is there; harmless to say again."""
        ...

    def ended(self) -> None:
        """Nothing of it is left; harmless to say again."""
        ...


@dataclass(slots=True)
class Stay:
    """When a request was at one engine, in seconds of ``time.monotonic``, for whoever tells of it.

    times: what the engine has told. cause: lost, drained or recovering, if the request went on
    elsewhere. error: of an engine that was lost, in words.
    """

    sent_at: float
    engine: str = ""
    times: Times | None = None
    left_at: float | None = None
    cause: str = ""
    error: str = ""


class Attempt:
    """A request at one engine, until it ends there, the engine is lost, or it is cancelled.

    begun: whether the engine has run it. proven: whether a token has come of that. over: tells the
    sink why nothing more comes of it, if so.
    """

    def __init__(
        self, table: "AttemptTable", number: int, request: Continuation, sink: Sink
    ) -> None:
        self.request = request
        self.begun = self.proven = False
        self.stay = Stay(time.monotonic())
        self.over: Callable[[], None] | None = None
        self.place: Place | None = None
        self.sink = sink
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._table = table
        self._number = number

    @property
    def load(self) -> EngineLoad:
        """Of its engine."""
        return self._table.load

    def stop_at_text(self, index: int) -> None:
        """End one completion whose text reached a stop string."""
        self._table.send(StopAtText(self._number, index))

    def cancel(self) -> None:
        """End it at the engine; nothing more comes of it."""
        if self._table.forget(self._number, self.request.sampling.n):
            self._table.send(Cancel(self._number))
        self.left()

    def done(self) -> None:
        """Every completion has ended."""
        self._table.forget(self._number, self.request.sampling.n)
        self.left()

    def end(self, tell: Callable[["Attempt", str], None], cause: str) -> None:
        """Nothing more comes of it. The sink is told at once, and once more when it gets an attempt
        that was over before it had it."""
        self.over = lambda: tell(self, cause)
        self.over()

    def left(self) -> None:
        """The place is free; harmless to say again."""
        if self.stay.left_at is None:
            self.stay.left_at = time.monotonic()
        if self.place is not None:
            self.place.ended()

    def prove(self) -> None:
        """A token has come."""
        self.proven = True
        if self.place is not None:
            self.place.started()


class AttemptTable:
    """The requests of one client at one engine, by number. ``send`` takes a command there.

    All of it runs in the client's asyncio loop.
    """

    def __init__(self, send: Callable[[Command], None]) -> None:
        self.send = send
        self.load = EngineLoad(0, 0, 0, 0)
        self.failure: str | None = None
        self._attempts: dict[int, Attempt] = {}
        self._completions: dict[int, tuple[Attempt, int]] = {}  # attempt and index
        self._questions: dict[int, asyncio.Future[list[Metric]]] = {}
        self._next = 0

    async def submit(self, request: Continuation, sink: Sink) -> Attempt:
        """Send a request and wait until the engine has queued it.

        Raises RequestError, PromptTooLong or QueueFull if it refuses, EngineError if it is gone.
        """
        self._check()
        number, n = self._next, request.sampling.n
        self._next += n
        attempt = Attempt(self, number, request, sink)
        self._attempts[number] = attempt
        self._completions.update((number + i, (attempt, i)) for i in range(n))
        self.send(Submit(number, request))
        try:
            await attempt.admitted
        except asyncio.CancelledError:
            attempt.cancel()
            raise
        return attempt

    async def stats(self) -> list[Metric]:
        """Ask the engine for its metrics. Raises EngineError if it is gone."""
        self._check()
        number = self._next
        self._next += 1
        answer: asyncio.Future[list[Metric]] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        self.send(Ask(number))
        try:
            return await answer
        finally:
            del self._questions[number]

    def receive(self, update: Update) -> None:
        """Hand out what came."""
        attempts, completions = self._attempts, self._completions
        for number in update.accepted:
            attempt = attempts.get(number)
            if attempt is not None and not attempt.admitted.done():
                attempt.admitted.set_result(None)
        for refused in update.refused:
            self._refuse(refused)
        for number in update.begun:
            if (attempt := attempts.get(number)) is not None:
                attempt.begun = True
        for times in update.times:
            if (attempt := attempts.get(times.number)) is not None:
                attempt.sink.put_times(attempt, times)
        columns = zip(update.completions, update.positions, update.tokens, strict=True)
        for completion, position, token in columns:
            if (found := completions.get(completion)) is not None:
                found[0].sink.put_token(*found, position, token)
        for number, outcome in update.outcomes:
            if (attempt := attempts.get(number)) is not None:
                attempt.sink.put(attempt, outcome)
        for number, metrics in update.answers:
            answer = self._questions.get(number)
            if answer is not None and not answer.done():
                answer.set_result(metrics)
        if update.load is not None:
            self._take_load(update.load)
        if update.ended is not None:
            for attempt in self._take_all():
                attempt.end(attempt.sink.ended, update.ended)
        if update.failure is not None:
            self.fail(update.failure)

    def forget(self, number: int, n: int) -> bool:
        """Whether an attempt was known until now."""
        for completion in range(number, number + n):
            self._completions.pop(completion, None)
        return self._attempts.pop(number, None) is not None

    def fail(self, cause: str) -> None:
        """The engine is gone."""
        if self.failure is None:
            self.failure = cause
        for attempt in self._take_all():
            if not attempt.admitted.done():
                attempt.admitted.set_exception(errors.EngineError(cause))
                attempt.admitted.exception()  # it may be that nobody waits for it any longer
            else:
                attempt.end(attempt.sink.lost, cause)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(errors.EngineError(cause))

    # ---- inside ----

    def _check(self) -> None:
        if self.failure is not None:
            raise errors.EngineError(self.failure)

    def _refuse(self, refused: Refused) -> None:
        attempt = self._attempts.get(refused.number)
        if attempt is not None:
            self.forget(refused.number, attempt.request.sampling.n)
            if not attempt.admitted.done():
                error = getattr(errors, refused.error)(refused.message)
                attempt.admitted.set_exception(error)

    def _take_load(self, load: EngineLoad) -> None:
        self.load = load
        if not load.admits:
            for attempt in list(self._attempts.values()):
                if attempt.admitted.done():
                    attempt.sink.asked_to_leave(attempt)

    def _take_all(self) -> list[Attempt]:
        attempts = list(self._attempts.values())
        self._attempts.clear()
        self._completions.clear()
        for attempt in attempts:
            attempt.left()
        return attempts
