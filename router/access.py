"""The access log: a line for each request, with its tokens and times, never its text."""

import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.log import get_logger
from engine.outputs import RequestOutput
from router.generation import Generation
from router.guard import OPEN_PATHS, REQUEST_ID, client_address
from router.scopes import path_of

log = get_logger("access")

_GENERATIONS = "manta.generations"
TRACE_ID = "manta.trace_id"  # in the scope of a request that is traced
UNLOGGED = (*OPEN_PATHS, "/dashboard")  # what is asked for every few seconds, by machines


def remember(scope: Scope, generations: list[Generation]) -> None:
    """Tell the access log, and the trace, what a request has had computed."""
    scope[_GENERATIONS] = generations


def generations_of(scope: Scope) -> list[Generation]:
    """What a request has had computed."""
    found: list[Generation] = scope.get(_GENERATIONS, [])
    return found


class AccessLog:
    """ASGI middleware that logs each request once its answer has been sent, or its client has
    gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope).startswith(UNLOGGED):
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        seen: dict[str, Any] = {"status": 499}  # a client that has gone gets no answer

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                for name, value in message.get("headers", ()):
                    if name == REQUEST_ID:
                        seen["request_id"] = value.decode("latin-1")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                **seen,
                "client": client_address(scope),
                **({"trace_id": scope[TRACE_ID]} if TRACE_ID in scope else {}),
                **_of(generations_of(scope)),
                "seconds": round(time.perf_counter() - started, 6),
            }
            log.info("request", extra={"fields": fields})


def _of(generations: list[Generation]) -> dict[str, Any]:
    """Tokens and times of what a request has had computed; nothing where nothing was."""
    outputs = [generation.output for generation in generations]
    if not outputs:
        return {}
    completions = [one for output in outputs for one in output.outputs]
    reasons = sorted({str(one.finish_reason or "gone") for one in completions})
    return {
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "output_tokens": sum(len(one.token_ids) for one in completions),
        "finish_reason": ",".join(reasons),
        "preemptions": sum(output.metrics.num_preemptions for output in outputs),
        **_times(outputs),
    }


def _times(outputs: list[RequestOutput]) -> dict[str, float]:
    """The longest time in the queue, and the shortest to a first token, in seconds."""
    queued = [t for output in outputs if (t := output.metrics.time_in_queue) is not None]
    first = [t for output in outputs if (t := output.metrics.time_to_first_token) is not None]
    times = {
        "queue_seconds": max(queued, default=None),
        "first_token_seconds": min(first, default=None),
    }
    return {name: round(value, 6) for name, value in times.items() if value is not None}
