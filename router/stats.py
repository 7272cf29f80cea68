"""What an ingress process counts of itself."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.stats import Histogram, Metric, Sample, gauge

STAGES = {
    "validate": "reading and checking the body",
    "template": "rendering the chat template",
    "tokenize": "text to tokens",
    "queue": "arrival at the engine to first step",
    "first_token": "arrival at the engine to first token",
    "stream": "tokens to text and chunks, all of a request's",
}
# Of the request whose context this is, if it is traced: (stage, its end, its seconds).
STAGES_SEEN: ContextVar[list[tuple[str, float, float]] | None] = ContextVar(
    "manta_stages_seen", default=None
)
CAUSES = ("lost", "drained", "recovering")  # of a move
MOVE_SECONDS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
)  # fmt: skip
SECONDS = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


class RouterStats:
    """Times by stage, and answers by route and status."""

    def __init__(self) -> None:
        self._stages = {stage: Histogram(SECONDS) for stage in STAGES}
        self.answers: Counter[tuple[str, str, str]] = Counter()  # by method, route, status
        self._moves: dict[str, Histogram] = {cause: Histogram(MOVE_SECONDS) for cause in CAUSES}
        self.in_flight = 0  # answers that are not all sent

    def observe(self, stage: str, seconds: float) -> None:
        """A request spent so long in a stage, until now."""
        self._stages[stage].observe(seconds)
        if (seen := STAGES_SEEN.get()) is not None:
            seen.append((stage, time.monotonic(), seconds))

    def moved(self, cause: str, seconds: float) -> None:
        """A request went on at another engine; its next token came so much later."""
        self._moves[cause].observe(seconds)

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Observe how long the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.observe(stage, time.perf_counter() - started)

    def metrics(self) -> list[Metric]:
        """Everything, named."""
        stages = tuple(
            Sample((stage,), histogram.sum, tuple(histogram.counts))
            for stage, histogram in self._stages.items()
        )
        told = "; ".join(f"{stage}: {what}" for stage, what in STAGES.items())
        answers = tuple(Sample(labels, count) for labels, count in sorted(self.answers.items()))
        return [
            Metric(
                "router_stage_seconds",
                "histogram",
                f"Time of a request in each stage of the router ({told}).",
                ("stage",),
                stages,
                SECONDS,
            ),
            Metric(
                "http_requests",
                "counter",
                "HTTP answers; status 499 is a client that went.",
                ("method", "handler", "status"),
                answers,
            ),
            Metric(
                "failover_seconds",
                "histogram",
                "Time from the loss of a request's engine, or from leaving it, to its next token.",
                ("cause",),
                tuple(
                    Sample((cause,), histogram.sum, tuple(histogram.counts))
                    for cause, histogram in self._moves.items()
                ),
                MOVE_SECONDS,
            ),
            Metric(
                "requests_moved",
                "counter",
                "Requests that went on at another engine: theirs was lost, drained, or started its"
                " workers again.",
                ("cause",),
                tuple(
                    Sample((cause,), sum(histogram.counts))
                    for cause, histogram in self._moves.items()
                ),
            ),
            gauge("router_requests_in_flight", "Requests under way.", self.in_flight),
        ]


class AnswerCounter:
    """ASGI middleware that counts answers."""

    def __init__(self, app: ASGIApp, stats: RouterStats) -> None:
        self._app = app
        self._answers = stats.answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        def count(status: int) -> None:
            nonlocal started
            started = True
            route = getattr(scope.get("route"), "path", "none")
            self._answers[scope["method"], route, str(status)] += 1

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except asyncio.CancelledError:  # so Serve says that the client went
            if not started:
                count(499)
            raise
