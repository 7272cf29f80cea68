"""A collector of OpenTelemetry's: takes OTLP over HTTP and keeps the spans."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Seen:
    """A span, with ids in hexadecimal digits and times in seconds."""

    name: str
    id: str
    trace: str
    parent: str
    start: float
    end: float
    attributes: dict[str, Any]
    events: list[tuple[str, float, dict[str, Any]]]
    error: str | None
    resource: dict[str, Any]


class Collector:
    """What has come so far: ``spans``, and ``body``, their bytes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Seen] = []
        self.body = b""

    def children(self, parent: Seen) -> list[Seen]:
        found = [span for span in self.spans if span.parent == parent.id]
        return sorted(found, key=lambda span: span.start)

    def take(self, body: bytes) -> None:
        self.body += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            facts = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_seen(span, facts) for span in scope.spans]


def _values(pairs: Any) -> dict[str, Any]:
    def value(any: Any) -> Any:
        kind = any.WhichOneof("value")
        if kind == "array_value":
            return [value(one) for one in any.array_value.values]
        return getattr(any, kind)

    return {pair.key: value(pair.value) for pair in pairs}


def _seen(span: Span, resource: dict[str, Any]) -> Seen:
    return Seen(
        span.name,
        span.span_id.hex(),
        span.trace_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        _values(span.attributes),
        [(e.name, e.time_unix_nano / 1e9, _values(e.attributes)) for e in span.events],
        span.status.message if span.status.code == 2 else None,
        resource,
    )


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
