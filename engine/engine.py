"""The engine: continuations in, outcomes out, one step at a time.

It owns no thread and no text. ``add`` queues a request, ``step`` plans and runs one step and
returns what it brought, ``abort`` ends a request at any moment. When its executor fails it starts
that again, and whatever it had goes on from its tokens.
"""

import heapq
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.choice import check_choice
from engine.config import EngineConfig
from engine.continuation import Continuation
from engine.errors import EngineError, PromptTooLong, QueueFull, RequestError
from engine.executor import Capacity, Executor, ModelFacts, PendingResult
from engine.extras import POOLS, extras_of
from engine.kv import KVBlocks
from engine.log import get_logger
from engine.outcome import Outcome, StepOutcomes, end_of
from engine.outputs import RequestMetrics
from engine.plan import StepResult
from engine.preempt import Costs
from engine.scheduler import Scheduler
from engine.sequence import FinishReason, Sequence
from engine.states import States
from engine.stats import EngineStats, Metric, SequenceTimes
from engine.stats_scheduler import cache_metric, invariance_metric, scheduler_metrics

MOST_BAD_WORD_TOKENS = 1 << 16  # of a request; each word takes as much room as the longest

log = get_logger("engine")


@dataclass(slots=True)
class _Active:
    """A request that is not finished. ``sequences`` and ``times`` are by index."""

    sequences: dict[int, Sequence]
    metrics: RequestMetrics
    unfinished: int = field(init=False)
    times: dict[int, SequenceTimes] = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.sequences)
        self.times = {i: SequenceTimes(seq.prompt_len) for i, seq in self.sequences.items()}


class Engine:
    """Queues, plans, and runs steps on an executor that ``load`` and ``reserve`` made ready.

    ``on_begin`` is told which sequences a step is about to run that these workers have not run
    before, so that it is known whom to suspect if the step is the last one.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        facts: ModelFacts,
        capacity: Capacity,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        if not facts.causal:
            config = config.with_whole_prompts(facts.max_model_len)
        self.config = config
        self.executor = executor
        self.facts = facts
        self.capacity = capacity
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.on_begin: Callable[[list[Sequence]], None] = lambda begun: None
        cache = config.cache
        states = None
        if capacity.num_states:
            states = States(
                capacity.num_states,
                capacity.num_cpu_states,
                capacity.block_size,
                -(-capacity.state_bytes // max(1, capacity.block_bytes)),
                cache.mamba_block_size if cache.enable_prefix_caching else None,
            )
        kv = KVBlocks(
            capacity.num_device_blocks,
            capacity.num_cpu_blocks,
            capacity.block_size,
            cache.enable_prefix_caching,
            states,
        )
        batches = executor.steps_ahead + 1 if executor.pipelined else 1
        alone_from = max(1, min(2, config.failover.max_failovers))
        costs = Costs(capacity.costs)
        self.scheduler = Scheduler(config.scheduler, kv, costs, batches, alone_from)
        self._active: dict[str, _Active] = {}
        self._deadlines: list[tuple[float, str, _Active]] = []  # a heap; some have finished
        self._pending: deque[tuple[int, PendingResult]] = deque()  # with the step's tokens
        self._failure: str | None = None
        self._lost: str | None = None  # why the executor is to be started again
        self._restarts = 0  # since the last step that gave a result
        self._ended: list[tuple[Sequence, Outcome]] = []  # that the next step tells of
        self.stats = EngineStats(max_model_len)

    # ---- requests ----

    @property
    def num_unfinished(self) -> int:
        return len(self._active)

    def add(self, request: Continuation) -> RequestMetrics:
        """Queue a request; its times will appear in the value returned.

        Raises RequestError (naming what is wrong), PromptTooLong if it could never run, and
        QueueFull if too many wait; the engine is as it was then.
        """
        self.check()
        try:
            return self._add(request)
        except RequestError as error:
            self.stats.rejected[type(error).__name__] += 1
            raise

    def _add(self, request: Continuation) -> RequestMetrics:
        if request.request_id in self._active:
            raise RequestError(f"request_id {request.request_id!r} is running already")
        _check_values(request)
        made = self._pooling_sequences if request.pools else self._sequences
        sequences = made(request)
        now = time.monotonic()
        active = _Active(sequences, RequestMetrics(arrival_time=now))
        self._active[request.request_id] = active
        if request.time_left is not None:
            deadline = now + request.time_left
            heapq.heappush(self._deadlines, (deadline, request.request_id, active))
        for seq in sequences.values():
            self.scheduler.add(seq)
        self.stats.added(request)
        return active.metrics

    def _sequences(self, request: Continuation) -> dict[int, Sequence]:
        """Of a request that generates, by the index of the completion."""
        sampling = request.sampling
        if not self.facts.generates:
            raise RequestError("the model generates no tokens: it has no output layer")
        max_total = self._admissible(request)
        sampling.check_vocabulary(self.facts.vocab_size)
        eos = () if sampling.ignore_eos else self.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*eos, *(sampling.stop_token_ids or ()))))
        check_choice(sampling, request.bad_words, stop_ids, self.facts.vocab_size)
        most = self.config.model.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(sampling, name)
            count = self.facts.vocab_size if asked == -1 else asked
            if asked is not None and most != -1 and count > most:
                raise RequestError(f"{name} must be at most max_logprobs ({most}), got {asked}")
        self._check_bad_words(request)
        extras, sampling = extras_of(request, stop_ids)
        if not request.moves:
            self._check_queue(request)
        return {
            index: Sequence(
                request,
                index,
                sampling=sampling,
                extras=extras,
                max_total=max_total,
                stop_ids=stop_ids,
                runs_ahead=not (self.executor.pipelined or extras.needs_results),
            )
            for index in request.unfinished
        }

    def _pooling_sequences(self, request: Continuation) -> dict[int, Sequence]:
        """The one of a request for a vector."""
        pooling = self.facts.pooling
        if pooling is None:
            raise RequestError("the model makes no vectors")
        self._check_prompt(request, self.max_model_len, "")
        if not request.moves:
            self._check_queue(request)
        length = len(request.prompt_token_ids)
        from_start = pooling.method != "last" or not self.facts.causal
        return {0: Sequence(request, max_total=length, extras=POOLS, from_start=from_start)}

    def abort(self, request_id: str) -> None:
        """End a request now; unknown and finished ones are left alone."""
        active = self._active.get(request_id)
        if active:
            for seq in active.sequences.values():
                self._finish(seq, FinishReason.ABORT)

    def stop_at_text(self, request_id: str, index: int) -> None:
        """End one completion whose text reached a stop string."""
        active = self._active.get(request_id)
        if active:
            self._finish(active.sequences[index], FinishReason.STOP)

    def _admissible(self, request: Continuation) -> int:
        """The most tokens that the request may come to."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        self._check_prompt(request, self.max_model_len - 1, ", which leaves one for the output")
        if sampling.max_tokens is None:
            max_total = self.max_model_len
        else:
            max_total = min(len(prompt) + sampling.max_tokens, self.max_model_len)
        room = self.capacity.num_device_blocks * self.capacity.block_size
        if max_total - 1 > room:
            raise PromptTooLong(
                f"prompt ({len(prompt)} tokens) and max_tokens ({sampling.max_tokens}) need room"
                f" for {max_total - 1} tokens; the KV cache holds {room}"
            )
        longest = max((len(request.output(index)) for index in request.unfinished), default=0)
        if len(prompt) + longest >= max_total:
            raise RequestError(f"outputs: a completion has all of its {longest} tokens already")
        return max_total

    def _check_prompt(self, request: Continuation, most: int, why: str) -> None:
        """Raises RequestError; PromptTooLong if it has more than ``most`` tokens, and ``why``."""
        prompt = request.prompt_token_ids
        if not len(prompt):
            raise RequestError("prompt must not be empty")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.facts.vocab_size:
            raise RequestError(
                f"prompt has token id {low if low < 0 else high}; the model's go from 0 to"
                f" {self.facts.vocab_size - 1}"
            )
        if len(prompt) > most:
            raise PromptTooLong(
                f"prompt has {len(prompt)} tokens; with max_model_len {self.max_model_len} it may"
                f" have at most {most}{why}"
            )

    @staticmethod
    def _check_bad_words(request: Continuation) -> None:
        count, longest = len(request.bad_words), max(map(len, request.bad_words), default=0)
        if count * longest > MOST_BAD_WORD_TOKENS:
            raise RequestError(
                f"bad_words has {count} forms, the longest of {longest} tokens; their product may"
                f" be at most {MOST_BAD_WORD_TOKENS}"
            )

    def _check_queue(self, request: Continuation) -> None:
        limits, scheduler = self.config.scheduler, self.scheduler
        most = limits.max_queued_requests
        if most is not None and scheduler.num_waiting + request.sampling.n > most:
            raise QueueFull(
                f"{scheduler.num_waiting} sequences wait; max_queued_requests is {most}"
            )
        most = limits.max_queued_tokens
        if most is not None:
            queued = scheduler.waiting_tokens
            if queued + len(request.prompt_token_ids) * request.sampling.n > most:
                raise QueueFull(f"{queued} tokens wait; max_queued_tokens is {most}")

    # ---- steps ----

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._pending or self.recovering)

    @property
    def recovering(self) -> bool:
        """Whether the next step will only start the executor again, which may take long."""
        return self._lost is not None

    def step(self) -> StepOutcomes:
        """Plan and start steps, as far ahead of the oldest result as pays, and take that.

        If the executor fails, what it ran is queued again, and the next step starts it again.
        Raises EngineError if it fails for good: every request then ended with an error.
        """
        lost = self._lost
        self.check()
        self._expire()
        outcomes = StepOutcomes()
        try:
            if lost is not None:
                self._restart(lost)
            elif self._lost is None and (found := self._run()) is not None:
                outcomes = self._take(*found)
        except Exception as error:
            named = isinstance(error, EngineError)
            self._lose(str(error) if named else f"{type(error).__name__}: {error}")
        except BaseException as error:  # an interrupt in the middle of a step: it is half done
            self._failure = f"{type(error).__name__} during a step"
            raise
        if self._failure is not None:
            raise EngineError(f"the engine failed: {self._failure}")
        outcomes.others += self._ended
        self._ended = []
        return outcomes

    def _run(self) -> tuple[int, StepResult] | None:
        """The oldest result with its number of tokens, after the steps ahead of it were started."""
        while len(self._pending) <= self.executor.steps_ahead:
            plan = self.scheduler.plan()
            if plan is None:
                break
            if begun := self.scheduler.take_begun():
                self.on_begin(begun)
            self._pending.append((plan.num_tokens, self.executor.run(plan)))
        if not self._pending:
            return None
        num_tokens, pending = self._pending.popleft()
        return num_tokens, pending.result()

    def _take(self, num_tokens: int, result: StepResult) -> StepOutcomes:
        outcomes = self.scheduler.apply(result)
        now = time.monotonic()
        for seq in outcomes.sequences:
            self._note_tokens(seq, 1, now)
        for seq, outcome in outcomes.others:
            self._note_tokens(seq, len(outcome.tokens), now)
            if outcome.vector is not None:
                self.stats.vector(self._active[seq.request_id].times[seq.index], now)
                self.stats.prompt(seq.prompt_len, seq.cached_tokens)
            if outcome.finish_reason is not None:
                self._retire(seq)
        self._restarts = 0
        self.stats.step(num_tokens, result.seconds, now)
        return outcomes

    def _note_tokens(self, seq: Sequence, count: int, now: float) -> None:
        active = self._active[seq.request_id]
        metrics = active.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = seq.scheduled_time
            metrics.num_cached_tokens = seq.cached_tokens
        if count:
            if metrics.first_token_time is None:
                metrics.first_token_time = now
                self.stats.prompt(seq.prompt_len, seq.cached_tokens)
            self.stats.tokens(count, active.times[seq.index], metrics, now)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, _, active = heapq.heappop(self._deadlines)
            for seq in active.sequences.values():
                if not seq.finished:
                    seq.stop_reason = "timeout"
                    self._end(seq, FinishReason.ABORT)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence, and have its client told with the next outcomes."""
        self._finish(seq, reason)
        self._ended.append((seq, end_of(seq)))

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        if not seq.finished:
            self.scheduler.finish(seq, reason)
            self._retire(seq)

    def _retire(self, seq: Sequence) -> None:
        active = self._active[seq.request_id]
        active.unfinished -= 1
        active.metrics.preempted_at += seq.preempted_at
        now = time.monotonic()
        assert seq.finish_reason is not None
        times, reason = active.times[seq.index], seq.finish_reason.value
        self.stats.ended(times, active.metrics, reason, len(seq.preempted_at), now)
        if active.unfinished == 0:
            active.metrics.finished_time = now
            self.stats.request_ended(list(active.times.values()))
            del self._active[seq.request_id]

    # ---- failures ----

    def check(self) -> None:
        """Raise EngineError, naming the cause, if the engine cannot go on; notice if its executor
        has to be started again."""
        if self._failure is None and self._lost is None:
            try:
                self.executor.check()
            except EngineError as error:
                self._lose(str(error))
        if self._failure is not None:
            raise EngineError(f"the engine failed earlier: {self._failure}")

    def _lose(self, cause: str) -> None:
        """The executor failed: queue what it ran, end what may be to blame."""
        self._pending.clear()
        self.scheduler.lose_workers()
        most = self.config.failover.max_failovers
        sequences = [seq for active in self._active.values() for seq in active.sequences.values()]
        for seq in sequences:
            if seq.deaths > most and not seq.finished:
                seq.stop_reason = died_with(seq.request_id, seq.deaths)
                self._end(seq, FinishReason.ERROR)
        if not most or self._restarts > most:  # and not one step came of it
            self._failure = cause
        self._lost = cause

    def _restart(self, cause: str) -> None:
        log.warning(
            "The workers failed (%s): starting them again for %d requests",
            cause.partition("\n")[0],
            len(self._active),
        )
        started = time.monotonic()
        self._restarts += 1
        try:
            self.executor.restart()
        except Exception as error:
            self._failure = f"{cause}; and they do not start again: {error}"
            return
        self._lost = None
        seconds = time.monotonic() - started
        self.stats.restarts.observe(seconds)
        log.info("The workers run again, after %.1f s", seconds)

    def metrics(self) -> list[Metric]:
        """What was counted so far, and what is now."""
        return [
            *self.stats.metrics(),
            *scheduler_metrics(self.scheduler, self.capacity),
            cache_metric(self.config.cache, self.capacity, self.max_model_len),
            invariance_metric(self.facts.batch_invariant),
        ]

    def stop(self) -> None:
        """Release what the executor holds."""
        self.executor.stop()


def died_with(request_id: str, deaths: int) -> str:
    """What is said of a request that may be what ends engines."""
    return (
        f"request {request_id} was running when the engine failed, {deaths} times in a row: it is"
        " not tried again"
    )


def _check_values(request: Continuation) -> None:
    priority = request.priority
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise RequestError(f"priority must be an integer, got {priority!r}")
    timeout = request.time_left
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (number and 0 <= timeout < math.inf):
        raise RequestError(f"timeout must be a number of seconds of at least 0, got {timeout!r}")
    if len(request.outputs) not in (0, request.sampling.n) or not request.unfinished:
        raise RequestError(
            f"outputs must be of {request.sampling.n} completions, one of them not ended"
        )
