"""``EngineLoop``: a thread that owns an engine, and ``LocalClient``, a client in its process.

Between two steps the thread takes in whatever clients sent, and after each it hands every client
all that the step brought for it in one ``Update``. Nothing waits for a timer: it sleeps only when
there is nothing to do, and wakes at once.
"""

import asyncio
import contextlib
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cluster.attempts import Attempt, AttemptTable
from cluster.client import EngineInfo, EngineLoad, Sink
from cluster.messages import (
    Ask,
    Cancel,
    Command,
    Drain,
    EndRequests,
    Refused,
    StopAtText,
    Submit,
    Times,
    Update,
)
from engine.continuation import Continuation
from engine.engine import Engine
from engine.errors import EngineError, QueueFull, RequestError
from engine.log import get_logger
from engine.outcome import StepOutcomes
from engine.outputs import RequestMetrics
from engine.sequence import Sequence
from engine.stats import Metric

log = get_logger("engine")

LOAD_EVERY = 0.02  # seconds between two figures of the load, at most, while there is work
LOAD_AT_LEAST = 0.5  # and at least, always
# Log-probabilities beyond OpenAI's 20 a position take more memory and time than anything else: so
# many in a request, and of a client's requests at once, which all fit its connection's buffer.
FEW_LOGPROBS = 20
MOST_LOGPROBS = 1 << 20
MOST_LOGPROBS_AT_ONCE = 1 << 22


class Peer(Protocol):
    """A client as the loop sees it."""

    def deliver(self, update: Update) -> None:
        """Take an update; called in the loop's thread, and must not wait."""
        ...


@dataclass(slots=True, eq=False)
class _Client:
    peer: Peer
    requests: dict[int, "_Request"] = field(default_factory=dict)
    update: Update | None = None  # what the next delivery brings
    logprobs: int = 0  # that its requests may bring, as ``MOST_LOGPROBS_AT_ONCE`` counts them


@dataclass(slots=True)
class _Request:
    client: _Client
    number: int
    request_id: str
    metrics: RequestMetrics
    unfinished: set[int]
    logprobs: int
    moves: int
    begun: bool = False
    has_token: bool = False


class EngineLoop:
    """Runs an engine in a thread of its own from ``start`` to ``stop``.

    The engine, and every method that is not said to be thread-safe, belongs to that thread.
    ``on_failure`` is called once, in the thread, when the engine cannot go on; ``on_leaving`` when
    it was told to leave and has nothing left to do.
    """

    def __init__(
        self,
        engine: Engine,
        on_failure: Callable[[str], None] = lambda cause: None,
        on_leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self.failure: str | None = None
        self._on_failure = on_failure
        self._on_leaving = on_leaving
        self._clients: dict[Peer, _Client] = {}
        self._requests: dict[str, _Request] = {}
        self._changed: list[_Client] = []  # those with an update
        self._load_time = 0.0
        self._step_since: float | None = None  # when the step that runs now began
        self._draining = self._leaving = self._closing = False
        self._stopping = False
        self._idle = threading.Event()
        self._idle.set()
        self._load = self._measure()
        engine.on_begin = self._tell_begun
        self._posted: deque[Callable[[], None]] = deque()
        self._at_end: list[Callable[[], None]] = []
        self._sleeping = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-engine", daemon=True)

    # ---- thread-safe ----

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Have ``call`` run in the thread, before the next step."""
        self._posted.append(call)
        if self._sleeping:
            self._wake.set()

    def at_end(self, call: Callable[[], None]) -> None:
        """Have ``call`` run when the thread ends, after all is sent."""
        self._at_end.append(call)

    def metrics(self, timeout: float = 5.0) -> list[Metric]:
        """What the engine has counted. Raises EngineError if it does not say so in time."""
        answer: queue.SimpleQueue[list[Metric]] = queue.SimpleQueue()
        self.post(lambda: answer.put(self.engine.metrics()))
        try:
            return answer.get(timeout=timeout)
        except queue.Empty:
            raise EngineError(f"the engine gave no metrics within {timeout:g} s") from None

    def drain(self, closing: bool = False) -> None:
        """Admit nothing any longer; what is queued or runs goes on to its end. ``closing``: the
        whole server shuts down."""
        self.post(lambda: self._start_drain(closing))

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until no request is left; whether that came within ``timeout`` seconds."""
        return self._idle.wait(timeout)

    def stop(self, timeout: float | None = None) -> None:
        """End every request with an error, and the thread, after the step that runs now, for
        which it waits up to ``timeout`` seconds."""
        if self._thread.is_alive():
            self.post(self._stop)
            self._thread.join(timeout)

    @property
    def load(self) -> EngineLoad:
        """What the engine had to do when its clients were last told."""
        return self._load

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    @property
    def step_seconds(self) -> float:
        """How long the step that runs now has been running; 0 if none does, or the engine's
        workers are started again."""
        since = self._step_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def recovering(self) -> bool:
        """Whether the engine's workers are started again."""
        return self._load.recovering

    # ---- for peers, in the thread ----

    def join(self, peer: Peer) -> None:
        """A client comes; it gets a figure of the load at once."""
        client = self._clients[peer] = _Client(peer)
        self._update_of(client).load = self._measure()
        if self.failure is not None:
            self._update_of(client).failure = self.failure

    def leave(self, peer: Peer) -> None:
        """A client is gone: so are its requests."""
        client = self._clients.pop(peer, None)
        if client is not None:
            client.update = None
            for request in list(client.requests.values()):
                self._end(request)

    def take(self, peer: Peer, command: Command) -> None:
        """Carry out a client's command."""
        client = self._clients.get(peer)
        if client is None:
            return
        if isinstance(command, Submit):
            self._submit(client, command)
            return
        if isinstance(command, Drain):
            self._start_drain(closing=not command.leave)
            self._leaving |= command.leave
            return
        if isinstance(command, EndRequests):
            self._end_requests(command.cause)
            return
        if isinstance(command, Ask):
            self._update_of(client).answers.append((command.number, self.engine.metrics()))
            return
        request = client.requests.get(command.number)
        if request is None:
            return  # it has ended meanwhile
        if isinstance(command, Cancel):
            self._end(request)
        elif isinstance(command, StopAtText) and command.index in request.unfinished:
            self.engine.stop_at_text(request.request_id, command.index)
            self._finished(request, command.index)

    # ---- inside ----

    def _run(self) -> None:
        try:
            while not self._stopping:
                busy = self.engine.has_work and self.failure is None
                self._poll(0.0 if busy else self._patience())
                self._flush()  # who was queued or refused hears of it before a long step
                if self._leaving and not self._requests:
                    self._leaving = False
                    self._on_leaving()
                if self.failure is None and not self._stopping:
                    self._step()
                self._push_load()
                self._flush()
        except Exception as error:  # a mistake of ours; nothing may hang for it
            log.exception("The engine's loop failed")
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            if self.failure is None:
                self._fail("the engine was stopped", told=False)
            self._flush()
            for call in self._at_end:
                call()
            self.engine.stop()

    def _poll(self, timeout: float) -> None:
        """Take in what clients sent, waiting for it up to ``timeout`` seconds."""
        if timeout:
            self._sleeping = True
            if not self._posted:  # else it came before the flag was seen
                self._wake.wait(timeout)
            self._sleeping = False
            self._wake.clear()
        while self._posted:
            self._posted.popleft()()

    def _patience(self) -> float:
        if self._changed:
            return 0.0
        return max(0.001, self._load_time + LOAD_AT_LEAST - time.monotonic())

    def _step(self) -> None:
        """Run a step if there is work; without any, see that the workers still live."""
        try:
            if not self.engine.has_work:
                self.engine.check()
                return
            if self.engine.recovering:
                self._push_load(at_once=True)
                self._flush()
            else:
                self._step_since = time.monotonic()
            outcomes = self.engine.step()
        except Exception as error:
            self._fail(str(error) if isinstance(error, EngineError) else repr(error))
            return
        finally:
            self._step_since = None
        self._deliver(outcomes)

    def _tell_begun(self, sequences: list[Sequence]) -> None:
        """Have clients know what runs before a step that may be the last one."""
        for seq in sequences:
            request = self._requests.get(seq.request_id)
            if request is not None and not request.begun:
                request.begun = True
                self._update_of(request.client).begun.append(request.number)
        self._flush()

    def _deliver(self, outcomes: StepOutcomes) -> None:
        columns = zip(outcomes.sequences, outcomes.positions, outcomes.tokens, strict=True)
        for seq, position, token in columns:
            request = self._requests.get(seq.request_id)
            if request is not None:
                update = request.client.update or self._update_of(request.client)
                if not request.has_token:
                    self._first_token(request)
                update.completions.append(request.number + seq.index)
                update.positions.append(position)
                update.tokens.append(token)
        for seq, outcome in outcomes.others:
            request = self._requests.get(seq.request_id)
            if request is not None:
                if outcome.tokens and not request.has_token:
                    self._first_token(request)
                self._update_of(request.client).outcomes.append((request.number, outcome))
                if outcome.finish_reason is not None:
                    self._finished(request, outcome.index)

    def _first_token(self, request: _Request) -> None:
        request.has_token = True
        self._update_of(request.client).times.append(_times(request))

    def _submit(self, client: _Client, command: Submit) -> None:
        number, request = command.number, command.request
        if not request.client:  # a program of its own
            request = replace(request, client=f"connection {id(client)}")
        update = self._update_of(client)
        try:
            if self.failure is not None:
                raise EngineError(self.failure)
            if self._draining:
                raise EngineError("the engine is draining: it takes no further requests")
            if number in client.requests:
                raise RequestError(f"request number {number} is in use")
            before = self._requests.get(request.request_id)
            if before is not None and before.moves < request.moves:
                self._end(before)  # its client has lost it here, and comes again
            logprobs = self._logprobs_of(client, request)
            metrics = self.engine.add(request)
        except (RequestError, EngineError) as error:
            update.refused.append(Refused(number, type(error).__name__, str(error)))
            return
        except Exception as error:  # a mistake of ours: one request must not take the others along
            log.exception("Request %s could not be queued", request.request_id)
            cause = f"{type(error).__name__}: {error}"
            update.refused.append(Refused(number, "EngineError", cause))
            return
        record = _Request(
            client,
            number,
            request.request_id,
            metrics,
            set(request.unfinished),
            logprobs,
            request.moves,
        )
        client.logprobs += logprobs
        client.requests[number] = self._requests[request.request_id] = record
        self._idle.clear()
        update.accepted.append(number)

    def _logprobs_of(self, client: _Client, request: Continuation) -> int:
        """The log-probabilities that a request may bring, of positions with more than a few.

        Raises RequestError if they are too many, QueueFull if they are for now.
        """
        engine, sampling = self.engine, request.sampling
        length = len(request.prompt_token_ids)
        room = engine.max_model_len - length
        positions = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        counts = {}
        for name, number in (("logprobs", positions), ("prompt_logprobs", length)):
            each = getattr(sampling, name)
            if each is not None and not 0 <= each <= FEW_LOGPROBS:
                each = engine.facts.vocab_size if each == -1 else each
                counts[name] = sampling.n * max(number, 0) * each
        total = sum(counts.values())
        if total > MOST_LOGPROBS:
            name = max(counts, key=lambda name: counts[name])
            raise RequestError(
                f"{name}: with n, max_tokens and the prompt's length this request may bring"
                f" {total} log-probabilities; with more than {FEW_LOGPROBS} a position at most"
                f" {MOST_LOGPROBS} are allowed"
            )
        if total and client.logprobs + total > MOST_LOGPROBS_AT_ONCE:
            raise QueueFull(
                f"{client.logprobs} log-probabilities are on their way already, of at most"
                f" {MOST_LOGPROBS_AT_ONCE}"
            )
        return total

    def _end(self, request: _Request) -> None:
        self.engine.abort(request.request_id)
        self._forget(request)

    def _end_requests(self, cause: str) -> None:
        """End every client's requests with an error."""
        for client in self._clients.values():
            if client.requests:
                self._update_of(client).ended = cause
            for request in list(client.requests.values()):
                self._end(request)

    def _finished(self, request: _Request, index: int) -> None:
        request.unfinished.discard(index)
        if not request.unfinished:
            self._update_of(request.client).times.append(_times(request))
            self._forget(request)

    def _forget(self, request: _Request) -> None:
        self._requests.pop(request.request_id, None)
        if request.client.requests.pop(request.number, None) is not None:
            request.client.logprobs -= request.logprobs
        if not self._requests:
            self._idle.set()

    def _start_drain(self, closing: bool) -> None:
        self._draining = True
        self._closing |= closing
        self._load_time = 0.0  # clients hear of it at once

    def _stop(self) -> None:
        self._stopping = True

    def _fail(self, cause: str, told: bool = True) -> None:
        self.failure = cause
        for client in self._clients.values():
            self._update_of(client).failure = cause
            client.requests.clear()
            client.logprobs = 0
        self._requests.clear()
        self._idle.set()
        if told:
            log.error("The engine cannot go on: %s", cause)
            self._on_failure(cause)

    # ---- what goes out ----

    def _update_of(self, client: _Client) -> Update:
        if client.update is None:
            client.update = Update()
            self._changed.append(client)
        return client.update

    def _push_load(self, at_once: bool = False) -> None:
        """Give every client the load where it has changed, and now and then as a sign of life."""
        now = time.monotonic()
        if not at_once and now - self._load_time < LOAD_EVERY and self.engine.has_work:
            return  # what has become idle says so at once
        load = self._measure()
        if load != self._load or now - self._load_time >= LOAD_AT_LEAST:
            self._load, self._load_time = load, now
            for client in self._clients.values():
                self._update_of(client).load = load

    def _measure(self) -> EngineLoad:
        scheduler = self.engine.scheduler
        return EngineLoad(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            waiting_tokens=scheduler.waiting_tokens,
            free_blocks=scheduler.kv.device.num_free,
            draining=self._draining,
            recovering=self.engine.recovering,
            closing=self._closing,
        )

    def _flush(self) -> None:
        changed, self._changed = self._changed, []
        for client in changed:
            update, client.update = client.update, None
            if update is not None:
                client.peer.deliver(update)


def _times(request: _Request) -> Times:
    metrics = request.metrics
    start = metrics.arrival_time
    queued, first, end = (
        None if moment is None else moment - start
        for moment in (
            metrics.first_scheduled_time,
            metrics.first_token_time,
            metrics.finished_time,
        )
    )
    preemptions = [moment - start for moment in metrics.preempted_at]
    return Times(request.number, queued, first, end, metrics.num_cached_tokens, preemptions)


class LocalClient:
    """An ``EngineClient`` of a loop in this process. Make it in the asyncio loop that uses it."""

    def __init__(self, loop: EngineLoop, info: EngineInfo) -> None:
        self.info = info
        self._loop = loop
        self._asyncio = asyncio.get_running_loop()
        self._table = AttemptTable(lambda command: loop.post(lambda: loop.take(self, command)))
        loop.post(lambda: loop.join(self))

    @classmethod
    async def start(cls, model: str, **options: Any) -> "LocalClient":
        """An engine of its own, from the options of ``LLM``; ``close`` ends it."""
        from cluster.replica import engine_config, start_engine  # imports torch

        config = engine_config(model=model, **options)
        engine, info = await asyncio.to_thread(start_engine, config, uuid.uuid4().hex[:8])
        loop = EngineLoop(engine)
        loop.start()
        return cls(loop, info)

    @property
    def load(self) -> EngineLoad:
        return self._table.load

    @property
    def healthy(self) -> bool:
        return self._loop.alive and self._loop.step_seconds < self.info.step_timeout

    async def submit(self, request: Continuation, sink: Sink) -> Attempt:
        return await self._table.submit(request, sink)

    async def stats(self) -> list[Metric]:
        return await self._table.stats()

    async def close(self) -> None:
        """Stop the loop and its engine."""
        await asyncio.to_thread(self._loop.stop)

    def deliver(self, update: Update) -> None:
        with contextlib.suppress(RuntimeError):  # the asyncio loop was closed
            self._asyncio.call_soon_threadsafe(self._table.receive, update)
