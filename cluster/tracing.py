"""Spans of OpenTelemetry for what is asked of a model, by clients of the router and by programs.

They are made when a request has ended, of times that are known anyway. No span has any of a
request's text.

    chat MODEL                       gen_ai attributes; an event ``failover`` for each move
      engine ID                      for each engine that had it; events ``preemption``
        queue, prefill, decode

Sources: OpenTelemetry's semantic conventions for generative AI; ``gen_ai.latency.*`` are vLLM's.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cluster.attempts import Stay
from cluster.streams import Stream
from engine.errors import MantaError
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_tokens",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "n": "choice.count",
}


@dataclass(frozen=True)
class Asked:
    """One prompt of a request, and what has become of it."""

    model: str
    stream: Stream
    output: RequestOutput
    sampling: SamplingParams


@contextlib.contextmanager
def of_program(operation: str, asked: Iterable[Asked]) -> Iterator[None]:
    """Spans for requests of this program's, which the block runs: by the tracer provider that the
    program has set, below the span that is current in it."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:  # then nobody has set one
        yield
        return
    tracer, parent = trace.get_tracer("manta"), trace.get_current_span()
    failure = None
    try:
        yield
    except MantaError as error:
        failure = error
        raise
    finally:
        for one in asked:
            Spans(tracer).of_model(parent, operation, [one], failure)


class Spans:
    """Makes the spans of what has ended; moments are seconds of ``time.monotonic``."""

    def __init__(self, tracer: "Tracer") -> None:
        self._tracer = tracer
        self._now = time.monotonic()
        self._epoch = time.time() - self._now

    def of_model(
        self,
        parent: "Span",
        operation: str,
        asked: Sequence[Asked],
        error: MantaError | None = None,
    ) -> None:
        """One below ``parent`` for what was asked of a model together, at least one request, and
        those of its engines. ``error`` is what ended those that have no end of their own."""
        arrival = min(one.stream.metrics.arrival_time for one in asked)
        span = self.child(parent, f"{operation} {asked[0].model}", arrival)
        if not span.is_recording():  # as the client, or the sampler, has it
            return
        span.set_attributes(_facts(operation, asked))
        completions = [c for one in asked for c in one.output.outputs]
        if any(c.finish_reason == "error" for c in completions):
            fail(span, next(str(c.stop_reason) for c in completions if c.finish_reason == "error"))
        elif error is not None and any(c.finish_reason is None for c in completions):
            fail(span, str(error))
        for number, one in enumerate(asked):
            facts = {"manta.prompt.index": number} if len(asked) > 1 else {}
            for stay in one.stream.stays:
                self._of_engine(span, stay, facts)
            for stay, following in pairwise(one.stream.stays):
                self._moved(span, stay, following, facts)
        ends = [self._end(stay) for one in asked for stay in one.stream.stays]
        span.end(self.at(max(ends, default=self._now)))

    def _of_engine(self, parent: "Span", stay: Stay, facts: Mapping[str, Any]) -> None:
        end = self._end(stay)
        span = self.child(parent, f"engine {stay.engine}", stay.sent_at)
        span.set_attributes({"manta.engine.id": stay.engine, **facts})
        if stay.error:
            fail(span, stay.error)
        times = stay.times
        if times is not None:
            moments = [0.0, times.queued, times.first_token, end - stay.sent_at]
            for name, (start, stop) in zip(
                ("queue", "prefill", "decode"), pairwise(moments), strict=True
            ):
                if start is not None and stop is not None:
                    self.child(span, name, stay.sent_at + start).end(self.at(stay.sent_at + stop))
            for moment in times.preemptions:
                span.add_event("preemption", timestamp=self.at(stay.sent_at + moment))
        span.end(self.at(end))

    def _moved(self, span: "Span", stay: Stay, following: Stay, facts: Mapping[str, Any]) -> None:
        """An event: the request left an engine, and got its next token at another."""
        left = following.sent_at if stay.left_at is None else stay.left_at
        event = {
            "manta.failover.cause": stay.cause,
            "manta.failover.from": stay.engine,
            "manta.failover.to": following.engine,
            **facts,
        }
        if following.times is not None and following.times.first_token is not None:
            event["manta.failover.seconds"] = following.sent_at + following.times.first_token - left
        span.add_event("failover", event, self.at(left))

    def _end(self, stay: Stay) -> float:
        return self._now if stay.left_at is None else stay.left_at

    def child(self, parent: "Span", name: str, start: float) -> "Span":
        """A span that began then, to be ended."""
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, set_span_in_context(parent), start_time=self.at(start))

    def at(self, moment: float) -> int:
        """Nanoseconds of the epoch."""
        return int((self._epoch + moment) * 1e9)


def _facts(operation: str, asked: Sequence[Asked]) -> dict[str, Any]:
    """The gen_ai attributes of a request, without any of its text."""
    outputs = [one.output for one in asked]
    completions = [one for output in outputs for one in output.outputs]
    metrics = [output.metrics for output in outputs]
    queued = [t for one in metrics if (t := one.time_in_queue) is not None]
    first = [t for one in metrics if (t := one.time_to_first_token) is not None]
    ended = [
        one.finished_time - one.arrival_time for one in metrics if one.finished_time is not None
    ]
    model, sampling = asked[0].model, asked[0].sampling
    facts = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "manta",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": [one.finish_reason or "abort" for one in completions],
        "gen_ai.usage.input_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "gen_ai.usage.cache_read.input_tokens": sum(one.num_cached_tokens for one in metrics),
        "gen_ai.usage.output_tokens": sum(len(one.token_ids) for one in completions),
        "manta.preemptions": sum(one.num_preemptions for one in metrics),
        "gen_ai.latency.time_in_queue": max(queued, default=None),
        "gen_ai.latency.time_to_first_token": min(first, default=None),
        "gen_ai.latency.e2e": max(ended, default=None),
        **_asked(sampling),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _asked(sampling: SamplingParams) -> dict[str, Any]:
    return {f"gen_ai.request.{name}": getattr(sampling, own) for own, name in _SAMPLING.items()}


def fail(span: "Span", why: str) -> None:
    """Say that what a span tells of did not succeed."""
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, why))
