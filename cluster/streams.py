"""One request, wherever it runs: engines may be lost under it, or leave, and it goes on.

All that it takes to go on is known here: the request, the tokens that came, the time that it has.
So when an engine is lost, the request is a continuation, which another engine takes, or the one
that replaces it. Tokens have positions, by which nothing is given twice and a gap is seen.
"""

import asyncio
import math
import time
from array import array
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Any, Protocol

from cluster.attempts import Attempt, Stay
from cluster.client import Sink
from cluster.messages import Times
from engine.config import FailoverConfig
from engine.continuation import Continuation
from engine.engine import died_with
from engine.errors import EngineError, QueueFull, Unavailable
from engine.log import get_logger
from engine.outcome import Outcome
from engine.outputs import RequestMetrics
from engine.sequence import FinishReason

log = get_logger("streams")

AGAIN = 0.05  # seconds between two looks for an engine that takes what has lost its own
LEAVE_AGAIN = 0.5  # and for one that takes what had better leave its own
SIGN = 2.0  # seconds of waiting for an engine after which a reader is told


async def settled(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all side by side to their ends, then raise the first's error, if there is one."""
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


class Route(Protocol):
    """Who knows the engines."""

    async def ready(self, seconds: float) -> bool:
        """Whether an engine takes requests: as soon as one does, or after so many seconds not."""
        ...

    async def admit(self, request: Continuation, sink: Sink, leaving: bool = False) -> Attempt:
        """Queue a request at the engine that suits it. ``leaving``: it has one that it would leave,
        and shall not wait.

        Raises RequestError if an engine says that it could never run, QueueFull if all have too
        many, Unavailable if none takes requests now, and EngineError if none ever will.
        """
        ...

    def moved(self, cause: str, seconds: float) -> None:
        """A request went on elsewhere; so many seconds later it got its next token. ``cause`` is
        lost, drained or recovering."""
        ...


class Stream:
    """A request's outcomes as they come, until every completion has a finish reason.

    Belongs to one asyncio loop, has one reader, and must be started. ``metrics`` fills as they
    come; the last ones complete it.
    """

    def __init__(self, request: Continuation, route: Route, policy: FailoverConfig) -> None:
        self.request_id = request.request_id
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        left = request.time_left
        self._deadline = math.inf if left is None else self.metrics.arrival_time + left
        self._request = request
        self._route = route
        self._policy = policy
        self.stays: list[Stay] = []  # where it was, in order
        self._attempt: Attempt | None = None
        self._tokens = [array("i", request.output(i)) for i in range(request.sampling.n)]
        self._unfinished = set(request.unfinished)
        self._ready: list[Outcome] = []
        self._moves, self._deaths = request.moves, request.deaths
        self._lost_at = 0.0  # when it lost its engine, if no token has come since
        self._cause = ""  # of that, for metrics
        self._leave_at = math.inf  # when to look for another engine than the one it has
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def start(self) -> "Stream":
        """Queue it. While all engines are away it waits for one, as those do that had one.

        Raises as ``Route.admit`` does; the stream then has nothing.
        """
        patience = self._policy.failover_timeout if self._policy.max_failovers else 0.0
        give_up_at = min(time.monotonic() + patience, self._deadline)
        request = self._request
        while True:
            try:
                self._arrive(await self._route.admit(request, self))
                return self
            except Unavailable as error:
                left = give_up_at - time.monotonic()
                if left <= 0 or error.code != "starting":
                    raise
                if not await self._route.ready(min(SIGN, left)):
                    await asyncio.sleep(AGAIN)
                request = self._continuation()  # it has less time left

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> list[Outcome]:
        """All that is ready, at least one outcome; or none, as a sign that the request still waits
        for an engine to go on at.

        Raises EngineError, naming the cause, if none is there in time.
        """
        sign = 0.0  # when to give one
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            if self._attempt is None:
                sign = sign or time.monotonic() + SIGN
                await self._go_on()
                if self._attempt is None and time.monotonic() >= sign:
                    return []
            elif self._leave_at == math.inf:
                await self._woken()
            elif (left := self._leave_at - time.monotonic()) > 0:
                await asyncio.wait((self._woken(),), timeout=left)
            else:
                await self._try_to_leave(self._attempt)
        ready, self._ready = self._ready, []
        return ready

    def stop_at_text(self, index: int) -> None:
        """End one completion whose text reached a stop string; its stream gives no more."""
        if index in self._unfinished:
            self._ready = [outcome for outcome in self._ready if outcome.index != index]
            if self._attempt is not None:
                self._attempt.stop_at_text(index)
            self._end(index)

    def cancel(self) -> None:
        """End the request now and free all that it holds; its completions end with ``abort``.
        Harmless when it has ended."""
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None
        if self._error is None:
            self._finish(FinishReason.ABORT)

    # ---- what an attempt brings ----

    def put_times(self, attempt: Attempt, times: Times) -> None:
        metrics, sent = self.metrics, attempt.stay.sent_at
        attempt.stay.times = times
        if metrics.first_scheduled_time is None and times.queued is not None:
            metrics.first_scheduled_time = sent + times.queued
            metrics.num_cached_tokens = times.cached_tokens
        if metrics.first_token_time is None and times.first_token is not None:
            metrics.first_token_time = sent + times.first_token
        if times.finished is not None:
            metrics.finished_time = sent + times.finished
            metrics.preempted_at += tuple(sent + moment for moment in times.preemptions)

    def put_token(self, attempt: Attempt, index: int, position: int, token: int) -> None:
        if index not in self._unfinished:
            return  # it was on its way when a stop string ended the completion
        tokens = self._tokens[index]
        if position != len(tokens):
            self._check_position(attempt, index, position)
            return
        tokens.append(token)
        if not attempt.proven or self._lost_at:
            self._note_token(attempt)
        if self._ready:
            self._add(Outcome(index, position, [token]))
        else:
            self._ready.append(Outcome(index, position, [token]))
        if self._waiter is not None:
            self._wake()

    def put(self, attempt: Attempt, outcome: Outcome) -> None:
        index = outcome.index
        if index not in self._unfinished or not self._check_position(
            attempt, index, outcome.position
        ):
            return
        known = len(self._tokens[index]) - outcome.position
        if known:
            outcome.position += known
            outcome.tokens = outcome.tokens[known:]
            outcome.logprobs = outcome.logprobs and outcome.logprobs[known:]
        self._tokens[index].extend(outcome.tokens)
        if outcome.tokens or outcome.vector is not None:
            self._note_token(attempt)
        self._add(outcome)
        if outcome.finish_reason is not None:
            self._end(index)
        self._wake()

    def lost(self, attempt: Attempt, cause: str) -> None:
        if attempt is not self._attempt:
            return
        self._attempt = None
        self._deaths += attempt.begun
        self._moves += 1
        self._lost_at = self._lost_at or time.monotonic()
        self._cause, self._leave_at = "lost", math.inf
        attempt.stay.cause, attempt.stay.error = "lost", cause
        if not self._policy.max_failovers:
            self._error = EngineError(cause)
        elif self._deaths > self._policy.max_failovers:
            self._finish(FinishReason.ERROR, died_with(self.request_id, self._deaths))
        self._wake()

    def ended(self, attempt: Attempt, cause: str) -> None:
        if attempt is self._attempt:
            self._attempt = None
            self._error = EngineError(cause)
            self._wake()

    def asked_to_leave(self, attempt: Attempt) -> None:
        if attempt is self._attempt and self._leave_at == math.inf:
            self._leave_at = 0.0
            self._wake()

    # ---- inside ----

    def _continuation(self) -> Continuation:
        now = time.monotonic()
        return replace(
            self._request,
            outputs=tuple(
                tokens.tolist() if index in self._unfinished else None
                for index, tokens in enumerate(self._tokens)
            ),
            time_left=None if self._deadline == math.inf else max(0.0, self._deadline - now),
            age=self._request.age + now - self.metrics.arrival_time,
            moves=self._moves,
            deaths=self._deaths,
        )

    async def _go_on(self) -> None:
        """Look for an engine for a while; end if there is no time left."""
        now = time.monotonic()
        if now >= self._deadline:
            self._finish(FinishReason.ABORT, "timeout")
            return
        give_up_at = self._lost_at + self._policy.failover_timeout
        last_moment = min(self._deadline, give_up_at)
        if await self._route.ready(min(SIGN, max(0.0, last_moment - now))):
            try:
                found = await self._route.admit(self._continuation(), self)
                if self._unfinished:
                    self._arrive(found)
                else:
                    found.cancel()  # it was cancelled meanwhile
                return
            except (QueueFull, EngineError):
                await asyncio.sleep(AGAIN)
        if time.monotonic() >= give_up_at:
            self._error = EngineError(self.stays[-1].error)

    async def _try_to_leave(self, attempt: Attempt) -> None:
        """Go on at an engine that takes requests, if there is one; what the old one brings until
        then is taken all the same."""
        self._leave_at = math.inf
        if attempt.load.admits:
            return  # it does again
        if not await self._route.ready(0.0):
            self._leave_at = time.monotonic() + LEAVE_AGAIN
            return
        request = replace(self._continuation(), moves=self._moves + 1)
        try:
            found = await self._route.admit(request, self, leaving=True)
        except (QueueFull, EngineError):
            self._leave_at = time.monotonic() + LEAVE_AGAIN
            return
        if self._attempt is attempt:
            self._cause = "drained" if attempt.load.draining else "recovering"
            self._lost_at = time.monotonic()
            attempt.stay.cause = self._cause
            attempt.cancel()
        elif self._attempt is not None or not self._unfinished:
            found.cancel()  # it ended meanwhile
            return
        self._moves = request.moves
        self._arrive(found)
        for index in set(request.unfinished) - self._unfinished:
            found.stop_at_text(index)

    def _arrive(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self.stays.append(attempt.stay)
        if attempt.over is not None:  # the engine was lost right after it had queued it
            attempt.over()
        elif not attempt.load.admits:
            self.asked_to_leave(attempt)

    def _check_position(self, attempt: Attempt, index: int, position: int) -> bool:
        """Whether an outcome follows on what is there. What was there already is nothing new, but
        where something is missing the attempt is worth nothing."""
        if position > len(self._tokens[index]):
            attempt.cancel()
            attempt.end(self.lost, f"request {self.request_id} lacks tokens from its engine")
            return False
        return True

    def _note_token(self, attempt: Attempt) -> None:
        if not attempt.proven:
            attempt.prove()
            self._deaths = 0
        if self._lost_at:
            self._route.moved(self._cause, time.monotonic() - self._lost_at)
            self._lost_at = 0.0

    def _add(self, outcome: Outcome) -> None:
        """Make it ready: one for each completion."""
        for ready in self._ready:
            if ready.index == outcome.index:
                ready.add(outcome)
                return
        self._ready.append(outcome)

    def _finish(self, reason: FinishReason, why: str | None = None) -> None:
        for index in sorted(self._unfinished):
            outcome = Outcome(index, len(self._tokens[index]), [])
            outcome.finish_reason, outcome.stop_reason = reason, why
            self._add(outcome)
            self._end(index)

    def _end(self, index: int) -> None:
        self._unfinished.discard(index)
        if not self._unfinished:
            if self._attempt is not None:
                self._attempt.done()
            if self.metrics.finished_time is None:
                self.metrics.finished_time = time.monotonic()
        self._wake()

    def _woken(self) -> asyncio.Future[None]:
        """Done as soon as there is something to see to."""
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        return waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
