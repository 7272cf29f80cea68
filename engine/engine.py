"""The engine: requests in, token deltas out, one step at a time.

It owns no thread and no text. ``add`` queues a request, ``step`` plans and runs one step and
returns what it brought, ``abort`` ends a request at any moment.
"""

import heapq
import math
import random
import time
from collections import deque
from dataclasses import dataclass, field

from engine.choice import check_choice
from engine.config import EngineConfig
from engine.errors import EngineError, PromptTooLong, QueueFull, RequestError
from engine.executor import Capacity, Executor, ModelFacts, PendingResult
from engine.extras import extras_of
from engine.kv import KVBlocks
from engine.outputs import RequestMetrics
from engine.plan import TokenLogprobs
from engine.preempt import Costs
from engine.request import Request
from engine.scheduler import Progress, Scheduler
from engine.sequence import FinishReason, Sequence
from engine.stats import EngineStats, Metric, SequenceTimes
from engine.stats_scheduler import cache_metric, invariance_metric, scheduler_metrics

_MASK64 = 2**64 - 1
MOST_BAD_WORD_TOKENS = 1 << 16  # of a request; each word takes as much room as the longest


@dataclass(slots=True)
class Delta:
    """What a step brought for one completion of a request.

    ``prompt_logprobs`` is (position of the first entry, entries); entries of a preempted prompt
    may come twice, the same.
    """

    request_id: str
    index: int
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[int, list[TokenLogprobs]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class _Active:
    """A request that is not finished."""

    sequences: list[Sequence]
    metrics: RequestMetrics
    unfinished: int = field(init=False)
    times: list[SequenceTimes] = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.sequences)
        self.times = [SequenceTimes(seq.prompt_len) for seq in self.sequences]


def child_seed(seed: int, index: int) -> int:
    """The seed of completion ``index`` of a request; the first one's is the request's own.

    One round of splitmix64 (Steele, Lea and Flood, 2014) for each child.
    """
    if index == 0:
        return seed & _MASK64
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


class Engine:
    """Queues, plans, and runs steps on an executor that ``load`` and ``reserve`` made ready.

    ``steps_ahead`` steps are planned and started before the result of the oldest is there. With
    ``pipelined`` the steps in flight have no sequence in common, as the stages of a pipeline need;
    without it the executor feeds a sequence its last sampled token itself.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        facts: ModelFacts,
        capacity: Capacity,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
        steps_ahead: int = 0,
        pipelined: bool = False,
    ) -> None:
        self.config = config
        self.executor = executor
        self.facts = facts
        self.capacity = capacity
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.steps_ahead = steps_ahead
        kv = KVBlocks(
            capacity.num_device_blocks,
            capacity.num_cpu_blocks,
            capacity.block_size,
            config.cache.enable_prefix_caching,
        )
        batches = steps_ahead + 1 if pipelined else 1
        self.scheduler = Scheduler(config.scheduler, kv, Costs(capacity.costs), batches)
        self._active: dict[str, _Active] = {}
        self._deadlines: list[tuple[float, str, _Active]] = []  # a heap; some have finished
        self._pending: deque[tuple[int, PendingResult]] = deque()  # with the step's tokens
        self._random = random.Random(config.model.seed)
        self._failure: str | None = None
        self.stats = EngineStats(max_model_len)

    # ---- requests ----

    @property
    def num_unfinished(self) -> int:
        return len(self._active)

    def add(self, request: Request) -> RequestMetrics:
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

    def _add(self, request: Request) -> RequestMetrics:
        sampling = request.sampling
        if request.request_id in self._active:
            raise RequestError(f"request_id {request.request_id!r} is running already")
        priority = request.priority
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise RequestError(f"priority must be an integer, got {priority!r}")
        timeout = request.timeout
        number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if timeout is not None and not (number and 0 <= timeout < math.inf):
            raise RequestError(
                f"timeout must be a number of seconds of at least 0, got {timeout!r}"
            )
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
        extras, sampling = extras_of(sampling, stop_ids)
        self._check_queue(request)
        seed = self._random.getrandbits(64) if sampling.seed is None else sampling.seed
        sequences = [
            Sequence(
                request.request_id,
                request.prompt_token_ids,
                sampling,
                index=index,
                seed=child_seed(seed, index),
                max_total=max_total,
                stop_ids=stop_ids,
                bad_words=request.bad_words,
                extras=extras,
                priority=request.priority,
                client=request.client,
            )
            for index in range(sampling.n)
        ]
        now = time.monotonic()
        active = _Active(sequences, RequestMetrics(arrival_time=now))
        self._active[request.request_id] = active
        if timeout is not None:
            heapq.heappush(self._deadlines, (now + timeout, request.request_id, active))
        for seq in sequences:
            self.scheduler.add(seq)
        self.stats.added(sampling.n, sampling.max_tokens)
        return active.metrics

    def abort(self, request_id: str) -> None:
        """End a request now; unknown and finished ones are left alone."""
        active = self._active.get(request_id)
        if active:
            for seq in active.sequences:
                self._finish(active, seq, FinishReason.ABORT)

    def stop_at_text(self, request_id: str, index: int) -> None:
        """End one completion whose text reached a stop string."""
        active = self._active.get(request_id)
        if active:
            self._finish(active, active.sequences[index], FinishReason.STOP)

    def _admissible(self, request: Request) -> int:
        """The most tokens that the request may come to."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        if not len(prompt):
            raise RequestError("prompt must not be empty")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.facts.vocab_size:
            raise RequestError(
                f"prompt has token id {low if low < 0 else high}; the model's go from 0 to"
                f" {self.facts.vocab_size - 1}"
            )
        if len(prompt) >= self.max_model_len:
            raise PromptTooLong(
                f"prompt has {len(prompt)} tokens; with max_model_len {self.max_model_len} it may"
                f" have at most {self.max_model_len - 1}, which leaves one for the output"
            )
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
        return max_total

    @staticmethod
    def _check_bad_words(request: Request) -> None:
        count, longest = len(request.bad_words), max(map(len, request.bad_words), default=0)
        if count * longest > MOST_BAD_WORD_TOKENS:
            raise RequestError(
                f"bad_words has {count} forms, the longest of {longest} tokens; their product may"
                f" be at most {MOST_BAD_WORD_TOKENS}"
            )

    def _check_queue(self, request: Request) -> None:
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
        return bool(self._active or self._pending)

    def step(self) -> list[Delta]:
        """Plan and start steps, up to ``steps_ahead`` before the oldest result, and take that.

        Raises EngineError if the executor failed: every request then ended with an error.
        """
        self.check()
        deltas = self._expire()
        try:
            while len(self._pending) <= self.steps_ahead:
                plan = self.scheduler.plan()
                if plan is None:
                    break
                self._pending.append((plan.num_tokens, self.executor.run(plan)))
            if not self._pending:
                return deltas
            num_tokens, pending = self._pending.popleft()
            result = pending.result()
        except Exception as error:
            named = isinstance(error, EngineError)
            self._failure = str(error) if named else f"{type(error).__name__}: {error}"
            raise EngineError(f"the engine failed: {self._failure}") from error
        except BaseException as error:  # an interrupt in the middle of a step: it is half done
            self._failure = f"{type(error).__name__} during a step"
            raise
        now = time.monotonic()
        for progress in self.scheduler.apply(result):
            deltas.append(self._delta(progress, now))
        self.stats.step(num_tokens, result.seconds, now)
        return deltas

    def _delta(self, progress: Progress, now: float) -> Delta:
        seq = progress.seq
        active = self._active[seq.request_id]
        metrics = active.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = seq.scheduled_time
            metrics.num_cached_tokens = seq.cached_tokens
        if progress.token is not None:
            if metrics.first_token_time is None:
                metrics.first_token_time = now
                self.stats.prompt(seq.prompt_len, seq.cached_tokens)
            self.stats.token(active.times[seq.index], metrics, now)
        delta = Delta(
            seq.request_id,
            seq.index,
            progress.token,
            progress.logprobs,
            progress.prompt_logprobs,
        )
        if seq.finished:
            delta.finish_reason, delta.stop_reason = seq.finish_reason, seq.stop_reason
            self._retire(active, seq)
        return delta

    def _expire(self) -> list[Delta]:
        deltas: list[Delta] = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, request_id, active = heapq.heappop(self._deadlines)
            for seq in active.sequences:
                if not seq.finished:
                    self._finish(active, seq, FinishReason.ABORT)
                    reason = FinishReason.ABORT
                    deltas.append(
                        Delta(request_id, seq.index, finish_reason=reason, stop_reason="timeout")
                    )
        return deltas

    def _finish(self, active: _Active, seq: Sequence, reason: FinishReason) -> None:
        if not seq.finished:
            self.scheduler.finish(seq, reason)
            self._retire(active, seq)

    def _retire(self, active: _Active, seq: Sequence) -> None:
        active.unfinished -= 1
        active.metrics.num_preemptions += seq.num_preemptions
        now = time.monotonic()
        assert seq.finish_reason is not None
        times, reason = active.times[seq.index], seq.finish_reason.value
        self.stats.ended(times, active.metrics, reason, seq.num_preemptions, now)
        if active.unfinished == 0:
            active.metrics.finished_time = now
            self.stats.request_ended(active.times)
            del self._active[seq.request_id]

    def check(self) -> None:
        """Raise EngineError, naming the cause, if the engine or its executor cannot go on."""
        if self._failure is None:
            try:
                self.executor.check()
            except EngineError as error:
                self._failure = str(error)
        if self._failure is not None:
            raise EngineError(f"the engine failed earlier: {self._failure}")

    def metrics(self) -> list[Metric]:
        """What was counted so far, and what is now."""
        return [
            *self.stats.metrics(),
            *scheduler_metrics(self.scheduler, self.capacity),
            cache_metric(self.config.cache, self.capacity, self.max_model_len),
            invariance_metric(self.facts.batch_invariant),
        ]

    # ---- the prefix cache ----

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, in both tiers."""
        self.scheduler.kv.device.forget_all()
        self.scheduler.kv.cpu.forget_all()

    def stop(self) -> None:
        """Release what the executor holds."""
        self.executor.stop()
