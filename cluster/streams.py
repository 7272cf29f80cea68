"""The client's side of requests in flight: what arrives in batches, handed out by request."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from cluster.client import EngineLoad
from cluster.messages import Ask, Batch, Cancel, Command, StopAtText, Submit, Times
from engine import errors
from engine.engine import Delta
from engine.outputs import RequestMetrics
from engine.request import Request
from engine.sequence import FinishReason
from engine.stats import Metric


async def settled(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all side by side to their ends, then raise the first's error, if there is one."""
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


class Stream:
    """A ``RequestStream``. It belongs to one asyncio loop and has one reader."""

    def __init__(self, table: "StreamTable", number: int, request: Request) -> None:
        self.request_id = request.request_id
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._table = table
        self._number = number
        self._unfinished = set(range(request.sampling.n))
        self._ready: list[Delta] = []
        self._failure: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> list[Delta]:
        while not self._ready:
            if self._failure is not None:
                raise errors.EngineError(self._failure)
            if not self._unfinished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        return ready

    def stop_at_text(self, index: int) -> None:
        """End one completion whose text reached a stop string; its stream gives no more."""
        if index in self._unfinished:
            self._ready = [delta for delta in self._ready if delta.index != index]
            self._table.send(StopAtText(self._number, index))
            self._end(index)

    def cancel(self) -> None:
        """End the request now; its completions end with the reason ``abort``."""
        if self._unfinished and self._failure is None:
            self._table.send(Cancel(self._number))
            for index in sorted(self._unfinished):
                delta = Delta(self.request_id, index, finish_reason=FinishReason.ABORT)
                self._ready.append(delta)
                self._end(index)

    # ---- for the table ----

    def put(self, delta: Delta) -> None:
        if delta.index in self._unfinished:
            self._ready.append(delta)
            if delta.finish_reason is not None:
                self._end(delta.index)
            elif self._waiter is not None:
                self._wake()

    def fail(self, cause: str) -> None:
        """Raise EngineError at the reader, after the deltas that came before."""
        self._failure = cause
        if not self.admitted.done():
            self.admitted.set_exception(errors.EngineError(cause))
            self.admitted.exception()  # it may be that nobody waits for it any longer
        self._wake()

    def _end(self, index: int) -> None:
        self._unfinished.discard(index)
        if not self._unfinished:
            if self.metrics.finished_time is None:
                self.metrics.finished_time = time.monotonic()
            self._table.forget(self._number)
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class StreamTable:
    """The requests of one client by number. ``send`` takes a command to the engine.

    All of it runs in the client's asyncio loop.
    """

    def __init__(self, send: Callable[[Command], None]) -> None:
        self.send = send
        self.load = EngineLoad(0, 0, 0, 0)
        self.failure: str | None = None
        self._streams: dict[int, Stream] = {}
        self._questions: dict[int, asyncio.Future[list[Metric]]] = {}
        self._next = 0

    async def submit(self, request: Request) -> Stream:
        """Send a request and wait until the engine has queued it.

        Raises RequestError, PromptTooLong or QueueFull if it refuses, EngineError if it is gone.
        """
        if self.failure is not None:
            raise errors.EngineError(self.failure)
        number = self._next
        self._next += 1
        stream = Stream(self, number, request)
        self._streams[number] = stream
        self.send(Submit(number, request))
        try:
            await stream.admitted
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream

    async def stats(self) -> list[Metric]:
        """Ask the engine for its metrics. Raises EngineError if it is gone."""
        if self.failure is not None:
            raise errors.EngineError(self.failure)
        number = self._next
        self._next += 1
        answer: asyncio.Future[list[Metric]] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        self.send(Ask(number))
        try:
            return await answer
        finally:
            del self._questions[number]

    def receive(self, batch: Batch) -> None:
        """Hand out what came."""
        if batch.load is not None:
            self.load = batch.load
        streams = self._streams
        for number in batch.accepted:
            stream = streams.get(number)
            if stream is not None and not stream.admitted.done():
                stream.admitted.set_result(None)
        for refused in batch.refused:
            stream = streams.pop(refused.number, None)
            if stream is not None and not stream.admitted.done():
                stream.admitted.set_exception(getattr(errors, refused.error)(refused.message))
        for times in batch.times:
            stream = streams.get(times.number)
            if stream is not None:
                _fill(stream.metrics, times)
        for number, token in zip(batch.numbers, batch.tokens, strict=True):
            stream = streams.get(number)
            if stream is not None:
                stream.put(Delta(stream.request_id, 0, token))
        for entry in batch.entries:
            stream = streams.get(entry.number)
            if stream is not None:
                stream.put(
                    Delta(
                        stream.request_id,
                        entry.index,
                        entry.token,
                        entry.logprobs,
                        entry.prompt_logprobs,
                        entry.finish_reason,
                        entry.stop_reason,
                    )
                )
        for number, metrics in batch.answers:
            answer = self._questions.get(number)
            if answer is not None and not answer.done():
                answer.set_result(metrics)
        if batch.failure is not None:
            self.fail(batch.failure)

    def forget(self, number: int) -> None:
        self._streams.pop(number, None)

    def fail(self, cause: str) -> None:
        """The engine is gone: every stream raises EngineError with the cause."""
        if self.failure is None:
            self.failure = cause
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(cause)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(errors.EngineError(cause))


def _fill(metrics: RequestMetrics, times: Times) -> None:
    start = metrics.arrival_time
    if times.queued is not None:
        metrics.first_scheduled_time = start + times.queued
    if times.first_token is not None:
        metrics.first_token_time = start + times.first_token
    if times.finished is not None:
        metrics.finished_time = start + times.finished
    metrics.num_cached_tokens = times.cached_tokens
    metrics.num_preemptions = times.preemptions
