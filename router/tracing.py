"""Traces: for each request spans of OpenTelemetry, sent to a collector.

They are made when a request has ended, of times that are known anyway, so that nothing but a few
clocks runs before. A request's trace goes on with the client's (``traceparent``). No span has any
of a request's text.

    POST /v1/chat/completions          what HTTP tells, and the request's id
      validate, template, tokenize     in the router
      chat MODEL                       gen_ai attributes; an event ``failover`` for each move
        engine ID                      for each engine that had it; events ``preemption``
          queue, prefill, decode

Sources: W3C Trace Context; OpenTelemetry's semantic conventions for HTTP servers and generative AI;
``gen_ai.latency.*`` are vLLM's.
"""

import os
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.attempts import Stay
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from router.access import TRACE_ID, UNLOGGED, generations_of
from router.generation import Generation
from router.guard import REQUEST_ID, client_address
from router.scopes import path_of
from router.stats import STAGES_SEEN

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_STAGES = ("validate", "template", "tokenize")
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
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


def make_provider(endpoint: str, instance: str, version: str) -> "TracerProvider":
    """What sends spans to the collector at ``endpoint``, from a thread of its own. ``instance`` is
    the id of this process. Further settings are those of OpenTelemetry's environment variables.

    Raises ConfigError as ``check_installed`` does.
    """
    check_installed()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    facts = {
        "service.name": os.environ.get("OTEL_SERVICE_NAME", "manta"),
        "service.version": version,
        "service.instance.id": instance,
    }
    provider = TracerProvider(resource=Resource.create(facts))
    path = "" if urlsplit(endpoint).path.strip("/") else "/v1/traces"
    exporter = OTLPSpanExporter(endpoint.rstrip("/") + path)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def check_installed() -> None:
    """Raises ConfigError if the packages for traces are not installed."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint needs OpenTelemetry ({error}): pip install 'manta-serve[otel]'"
        ) from None


class Tracing:
    """ASGI middleware that traces each request."""

    def __init__(self, app: ASGIApp, tracer: "Tracer") -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope).startswith(UNLOGGED):
            await self._app(scope, receive, send)
            return
        span = self._begin(scope)
        if not span.is_recording():  # as the client, or the sampler, has it
            await self._app(scope, receive, send)
            return
        scope[TRACE_ID] = f"{span.get_span_context().trace_id:032x}"
        stages: list[tuple[str, float, float]] = []
        token = STAGES_SEEN.set(stages)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                for name, value in message.get("headers", ()):
                    if name == REQUEST_ID:
                        span.set_attribute("manta.request.id", value.decode("latin-1"))
                if message["status"] >= 500:
                    _fail(span, f"status {message['status']}")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            STAGES_SEEN.reset(token)
            _Spans(self._tracer).of_request(span, scope, stages)

    def _begin(self, scope: Scope) -> "Span":
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        return self._tracer.start_span(
            f"{scope['method']} {path_of(scope)}",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "url.scheme": scope.get("scheme", "http"),
                "client.address": client_address(scope),
            },
        )


class _Spans:
    """The spans of a request that has ended; moments are seconds of ``time.monotonic``."""

    def __init__(self, tracer: "Tracer") -> None:
        self._tracer = tracer
        self._epoch = time.time() - time.monotonic()

    def of_request(
        self, span: "Span", scope: Scope, stages: list[tuple[str, float, float]]
    ) -> None:
        """All below ``span``, which ends."""
        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.set_attribute("http.route", route)
        for stage, end, seconds in stages:
            if stage in _STAGES:
                self._child(span, stage, end - seconds).end(self._at(end))
        if generations := generations_of(scope):
            self._of_model(span, _OPERATIONS.get(route or "", "chat"), generations)
        span.end()

    def _of_model(self, parent: "Span", operation: str, generations: list[Generation]) -> None:
        arrival = min(one.stream.metrics.arrival_time for one in generations)
        first = generations[0]
        span = self._child(parent, f"{operation} {first.model}", arrival)
        span.set_attributes(_facts(operation, generations))
        completions = [c for one in generations for c in one.output.outputs]
        if any(c.finish_reason == "error" for c in completions):
            _fail(span, next(str(c.stop_reason) for c in completions if c.finish_reason == "error"))
        for number, generation in enumerate(generations):
            facts = {"manta.prompt.index": number} if len(generations) > 1 else {}
            for stay in generation.stream.stays:
                self._of_engine(span, stay, facts)
            for stay, following in pairwise(generation.stream.stays):
                self._moved(span, stay, following, facts)
        span.end()

    def _of_engine(self, parent: "Span", stay: Stay, facts: Mapping[str, Any]) -> None:
        end = time.monotonic() if stay.left_at is None else stay.left_at
        span = self._child(parent, f"engine {stay.engine}", stay.sent_at)
        span.set_attributes({"manta.engine.id": stay.engine, **facts})
        if stay.error:
            _fail(span, stay.error)
        times = stay.times
        if times is not None:
            moments = [0.0, times.queued, times.first_token, end - stay.sent_at]
            for name, (start, stop) in zip(
                ("queue", "prefill", "decode"), pairwise(moments), strict=True
            ):
                if start is not None and stop is not None:
                    self._child(span, name, stay.sent_at + start).end(self._at(stay.sent_at + stop))
            for moment in times.preemptions:
                span.add_event("preemption", timestamp=self._at(stay.sent_at + moment))
        span.end(self._at(end))

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
        span.add_event("failover", event, self._at(left))

    def _child(self, parent: "Span", name: str, start: float) -> "Span":
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(
            name, set_span_in_context(parent), start_time=self._at(start)
        )

    def _at(self, moment: float) -> int:
        """Nanoseconds of the epoch."""
        return int((self._epoch + moment) * 1e9)


def _facts(operation: str, generations: list[Generation]) -> dict[str, Any]:
    """The gen_ai attributes of a request, without any of its text."""
    outputs = [generation.output for generation in generations]
    completions = [one for output in outputs for one in output.outputs]
    metrics = [output.metrics for output in outputs]
    queued = [t for one in metrics if (t := one.time_in_queue) is not None]
    first = [t for one in metrics if (t := one.time_to_first_token) is not None]
    ended = [
        one.finished_time - one.arrival_time for one in metrics if one.finished_time is not None
    ]
    model, sampling = generations[0].model, generations[0].sampling
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


def _fail(span: "Span", why: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, why))
