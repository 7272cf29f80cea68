"""Traces: for each request spans of OpenTelemetry, sent to a collector.

They are made when a request has ended, of times that are known anyway, so that nothing but a few
clocks runs before. A request's trace goes on with the client's (``traceparent``). No span has any
of a request's text.

    POST /v1/chat/completions          what HTTP tells, and the request's id
      validate, template, tokenize     in the router
      chat MODEL                       and what is below it: see cluster/tracing.py

Sources: W3C Trace Context; OpenTelemetry's semantic conventions for HTTP servers.
"""

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.tracing import Asked, Spans, fail
from engine.errors import ConfigError
from router.access import TRACE_ID, UNLOGGED, generations_of
from router.guard import REQUEST_ID, client_address
from router.scopes import path_of
from router.stats import STAGES_SEEN

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_STAGES = ("validate", "template", "tokenize")
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}


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
                    fail(span, f"status {message['status']}")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            STAGES_SEEN.reset(token)
            _end(span, Spans(self._tracer), scope, stages)

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


def _end(span: "Span", spans: Spans, scope: Scope, stages: list[tuple[str, float, float]]) -> None:
    """End the span of a request, with all that are below it."""
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        span.set_attribute("http.route", route)
    for stage, end, seconds in stages:
        if stage in _STAGES:
            spans.child(span, stage, end - seconds).end(spans.at(end))
    if generations := generations_of(scope):
        asked = [Asked(one.model, one.stream, one.output, one.sampling) for one in generations]
        spans.of_model(span, _OPERATIONS.get(route or "", "chat"), asked)
    span.end()
