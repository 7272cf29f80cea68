"""What an engine counts of itself: plain numbers in the loop, named and labelled when asked for.

Names and meanings are those of vLLM's metrics where it has one, so that dashboards carry over;
what renders them adds the prefix ``manta:`` and the labels ``model_name`` and ``engine``.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.continuation import Continuation
from engine.outputs import RequestMetrics

Kind = Literal["counter", "gauge", "histogram"]
MOST_PRIORITIES = 32  # label values; further priorities count as "other"

# Seconds. Every bound of vLLM's is among them; those below 10 ms are ours.
TOKEN_SECONDS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02,
    0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
FIRST_TOKEN_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0,
    15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COUNTS = (0, 1, 2, 5, 10, 20, 50, 100)


def token_counts(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to ``most``: vLLM's buckets of token counts."""
    bounds = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    return tuple(bound for bound in sorted(bounds) if bound <= max(most, 1))


@dataclass(frozen=True)
class Sample:
    """One time series: the values of its metric's labels, and its value.

    ``counts`` of a histogram are per bucket, not cumulative, the one without a bound last; the
    value is then the sum of what was observed.
    """

    labels: tuple[str, ...]
    value: float
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A metric with all its series. ``bounds`` are a histogram's upper bounds."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    bounds: tuple[float, ...] = ()


class Histogram:
    """Counts of observations up to each bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value``, ``times`` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def metric(self, name: str, help: str) -> Metric:
        """It, named."""
        sample = Sample((), self.sum, tuple(self.counts))
        return Metric(name, "histogram", help, (), (sample,), self.bounds)


@dataclass(slots=True)
class SequenceTimes:
    """What is remembered of one completion until it is finished."""

    prompt_tokens: int
    tokens: int = 0
    first: float = 0.0  # 0: no token yet, and no vector
    last: float = 0.0


@dataclass
class EngineStats:
    """Counted since the start of the engine."""

    max_model_len: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    vectors: int = 0
    corrupted: int = 0
    moved_in: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # by reason
    rejected: Counter[str] = field(default_factory=Counter)  # by error

    def __post_init__(self) -> None:
        tokens = token_counts(self.max_model_len)
        self.request_prompt_tokens = Histogram(tokens)
        self.request_generation_tokens = Histogram(tokens)
        self.request_max_tokens = Histogram(tokens)
        self.request_most_tokens = Histogram(tokens)
        self.request_computed_tokens = Histogram(tokens)
        self.request_n = Histogram((1, 2, 5, 10, 20))
        self.request_preemptions = Histogram(COUNTS)
        self.restarts = Histogram(REQUEST_SECONDS)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.step_seconds = Histogram(TOKEN_SECONDS)
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.inter_token = Histogram(TOKEN_SECONDS)
        self.per_token = Histogram(TOKEN_SECONDS)
        self.end_to_end = Histogram(REQUEST_SECONDS)
        self.queue = Histogram(REQUEST_SECONDS)
        self.inference = Histogram(REQUEST_SECONDS)
        self.prefill = Histogram(REQUEST_SECONDS)
        self.decode = Histogram(REQUEST_SECONDS)
        self._gaps: defaultdict[float, int] = defaultdict(int)  # of the step, by last token's time
        self._firsts = 0  # first tokens of the step

    # ---- what the engine tells ----

    def added(self, request: Continuation) -> None:
        """A request was queued."""
        self.moved_in += request.moves > 0
        self.request_n.observe(request.sampling.n)
        if request.sampling.max_tokens is not None and not request.pools:
            self.request_max_tokens.observe(request.sampling.max_tokens)

    def tokens(self, count: int, times: SequenceTimes, metrics: RequestMetrics, now: float) -> None:
        """A completion got ``count`` tokens at once."""
        self.generation_tokens += count
        first = not times.tokens
        times.tokens += count
        if first:
            times.first = now
            self._firsts += 1
            self.first_token.observe(now - metrics.arrival_time)
        else:
            self._gaps[times.last] += 1
        times.last = now

    def vector(self, times: SequenceTimes, now: float) -> None:
        """A prompt's vector is there."""
        self.vectors += 1
        times.first = times.last = now

    def prompt(self, num_tokens: int, num_cached: int) -> None:
        """A request's prompt was computed: its first token, or its vector, is there."""
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached

    def step(self, num_tokens: int, seconds: float, now: float) -> None:
        """A step that computed ``num_tokens`` ended; the tokens that it brought were told before.

        A token is computed when the next is wanted, the last one never: so prompts and outputs are
        what was computed and the first tokens.
        """
        self.step_tokens.observe(num_tokens + self._firsts)
        self._firsts = 0
        self.step_seconds.observe(seconds)
        for last, count in self._gaps.items():
            self.inter_token.observe(now - last, count)
        self._gaps.clear()

    def ended(
        self, times: SequenceTimes, metrics: RequestMetrics, reason: str, preemptions: int,
        now: float,
    ) -> None:  # fmt: skip
        """A completion is finished, for ``reason``."""
        self.finished[reason] += 1
        self.corrupted += reason == "error"
        self.request_prompt_tokens.observe(times.prompt_tokens)
        self.request_generation_tokens.observe(times.tokens)
        self.request_preemptions.observe(preemptions)
        self.end_to_end.observe(now - metrics.arrival_time)
        start = metrics.first_scheduled_time
        if start is None or not times.first:
            return
        self.request_computed_tokens.observe(times.prompt_tokens - metrics.num_cached_tokens)
        self.queue.observe(start - metrics.arrival_time)
        self.prefill.observe(times.first - start)
        self.decode.observe(times.last - times.first)
        self.inference.observe(times.last - start)
        if times.tokens > 1:
            self.per_token.observe((times.last - times.first) / (times.tokens - 1))

    def request_ended(self, times: Sequence[SequenceTimes]) -> None:
        """The last completion of a request is finished."""
        self.request_most_tokens.observe(max(one.tokens for one in times))

    # ---- what others are told ----

    def metrics(self) -> list[Metric]:
        """Everything counted here."""
        return [*self._of_tokens(), *self._of_ends(), *self._of_sizes(), *self._of_times()]

    def _of_tokens(self) -> list[Metric]:
        return [
            counter("prompt_tokens", "Tokens of prompts that were computed.", self.prompt_tokens),
            Metric(
                "prompt_tokens_by_source",
                "counter",
                "Prompt tokens by where their keys and values came from.",
                ("source",),
                (
                    Sample(("local_compute",), self.prompt_tokens - self.cached_tokens),
                    Sample(("local_cache_hit",), self.cached_tokens),
                ),
            ),
            counter("prompt_tokens_cached", "Prompt tokens found in a cache.", self.cached_tokens),
            counter("generation_tokens", "Tokens generated.", self.generation_tokens),
            counter("vectors", "Vectors made of prompts: embeddings and scores.", self.vectors),
        ]

    def _of_ends(self) -> list[Metric]:
        return [
            counter(
                "corrupted_requests", "Completions ended by logits that were not finite.",
                self.corrupted,
            ),
            labelled(
                "request_success", "Finished completions.", "finished_reason", self.finished,
                ("stop", "length", "abort", "error"),
            ),
            labelled(
                "admission_rejections", "Requests refused, by error.", "reason", self.rejected,
                ("QueueFull", "PromptTooLong", "RequestError"),
            ),
            counter(
                "requests_taken_over", "Requests that came from an engine that was lost or left.",
                self.moved_in,
            ),
            self.restarts.metric("worker_restart_seconds", "Starting failed workers again."),
        ]  # fmt: skip

    def _of_sizes(self) -> list[Metric]:
        return [
            self.step_tokens.metric(
                "iteration_tokens_total", "Prompt tokens computed and tokens generated in a step."
            ),
            self.request_prompt_tokens.metric("request_prompt_tokens", "Prompt tokens."),
            self.request_generation_tokens.metric(
                "request_generation_tokens", "Tokens generated for a completion."
            ),
            self.request_max_tokens.metric("request_params_max_tokens", "max_tokens asked for."),
            self.request_most_tokens.metric(
                "request_max_num_generation_tokens",
                "Tokens generated for the longest of a request's completions.",
            ),
            self.request_n.metric("request_params_n", "n asked for."),
            self.request_preemptions.metric(
                "request_num_preemptions", "Preemptions of a completion."
            ),
            self.request_computed_tokens.metric(
                "request_prefill_kv_computed_tokens", "Prompt tokens not found in a cache."
            ),
        ]

    def _of_times(self) -> list[Metric]:
        return [
            self.step_seconds.metric("step_time_seconds", "Time of a step."),
            self.first_token.metric("time_to_first_token_seconds", "Arrival to first token."),
            self.inter_token.metric("inter_token_latency_seconds", "Token to next token."),
            self.per_token.metric(
                "request_time_per_output_token_seconds", "A completion's mean time of a token."
            ),
            self.end_to_end.metric("e2e_request_latency_seconds", "Arrival to end."),
            self.queue.metric("request_queue_time_seconds", "Arrival to first step."),
            self.inference.metric("request_inference_time_seconds", "First step to last token."),
            self.prefill.metric("request_prefill_time_seconds", "First step to first token."),
            self.decode.metric("request_decode_time_seconds", "First token to last token."),
        ]


def counter(name: str, help: str, value: float) -> Metric:
    """A counter of one series."""
    return Metric(name, "counter", help, (), (Sample((), value),))


def gauge(name: str, help: str, value: float) -> Metric:
    """A gauge of one series."""
    return Metric(name, "gauge", help, (), (Sample((), value),))


def labelled(
    name: str, help: str, label: str, counts: Counter[str], always: Iterable[str] = ()
) -> Metric:
    """A counter with one label; ``always`` are its values that are there from the start."""
    values = dict.fromkeys(always, 0) | counts
    samples = tuple(Sample((value,), count) for value, count in values.items())
    return Metric(name, "counter", help, (label,), samples)
