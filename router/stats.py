"""What an ingress process counts of itself."""

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
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


class _Asked:
    """What is known of a request."""

    model = ""  # its id


_ASKED: ContextVar[_Asked | None] = ContextVar("manta_asked", default=None)
CAUSES = ("lost", "drained", "recovering")  # of a move
MOVE_SECONDS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
)  # fmt: skip
SECONDS = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


class _Times:
    """Of the requests for one model."""

    def __init__(self) -> None:
        self.stages = {stage: Histogram(SECONDS) for stage in STAGES}
        self.moves = {cause: Histogram(MOVE_SECONDS) for cause in CAUSES}


class RouterStats:
    """Times by model and stage, and answers by model, route and status.

    A model is known by its id; what is not for one, or for one that there is not, has none (""):
    labels must not be a client's to choose.
    """

    def __init__(self) -> None:
        self._times: defaultdict[str, _Times] = defaultdict(_Times)  # by model
        # By method, route, status and model.
        self.answers: Counter[tuple[str, str, str, str]] = Counter()
        self.in_flight = 0  # answers that are not all sent

    def asked_for(self, model: str) -> None:
        """The request whose context this is is for a model."""
        if (asked := _ASKED.get()) is not None:
            asked.model = model

    def observe(self, stage: str, seconds: float) -> None:
        """The request whose context this is spent so long in a stage, until now."""
        asked = _ASKED.get()
        self._times["" if asked is None else asked.model].stages[stage].observe(seconds)
        if (seen := STAGES_SEEN.get()) is not None:
            seen.append((stage, time.monotonic(), seconds))

    def moved(self, model: str, cause: str, seconds: float) -> None:
        """A request for a model went on at another engine; its next token came so much later."""
        self._times[model].moves[cause].observe(seconds)

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Observe how long the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.observe(stage, time.perf_counter() - started)

    def metrics(self, models: Iterable[str]) -> list[Metric]:
        """Everything, named. ``models``: those that have their series even if nobody has asked for
        them, as a rate needs a first value."""
        for model in models:
            self._times[model]  # makes it
        told = "; ".join(f"{stage}: {what}" for stage, what in STAGES.items())
        times = list(self._times.items())  # another thread may ask
        stages = {(model, name): h for model, one in times for name, h in one.stages.items()}
        moves = {(model, name): h for model, one in times for name, h in one.moves.items()}
        answers = tuple(Sample(labels, count) for labels, count in sorted(self.answers.items()))
        return [
            _histograms(
                "router_stage_seconds",
                f"Time of a request in each stage of the router ({told}).",
                "stage",
                stages,
                SECONDS,
            ),
            Metric(
                "http_requests",
                "counter",
                "HTTP answers; status 499 is a client that went.",
                ("method", "handler", "status", "model_name"),
                answers,
            ),
            _histograms(
                "failover_seconds",
                "Time from the loss of a request's engine, or from leaving it, to its next token.",
                "cause",
                moves,
                MOVE_SECONDS,
            ),
            Metric(
                "requests_moved",
                "counter",
                "Requests that went on at another engine: theirs was lost, drained, or started its"
                " workers again.",
                ("model_name", "cause"),
                tuple(Sample(labels, sum(h.counts)) for labels, h in moves.items()),
            ),
            gauge("router_requests_in_flight", "Requests under way.", self.in_flight),
        ]


def _histograms(
    name: str,
    help: str,
    label: str,
    found: Mapping[tuple[str, str], Histogram],
    bounds: tuple[float, ...],
) -> Metric:
    """One histogram for each model and value of the label."""
    samples = tuple(Sample(labels, h.sum, tuple(h.counts)) for labels, h in found.items())
    return Metric(name, "histogram", help, ("model_name", label), samples, bounds)


class AnswerCounter:
    """ASGI middleware that counts answers."""

    def __init__(self, app: ASGIApp, stats: RouterStats) -> None:
        self._app = app
        self._answers = stats.answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        asked = _Asked()
        token = _ASKED.set(asked)
        started = False

        def count(status: int) -> None:
            nonlocal started
            started = True
            route = getattr(scope.get("route"), "path", "none")
            self._answers[scope["method"], route, str(status), asked.model] += 1

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
        finally:
            _ASKED.reset(token)
