"""Errors as HTTP answers, in the shape that OpenAI's clients know."""

import contextlib
import re
from collections.abc import Iterator, Mapping

import msgspec

from engine.errors import EngineError, PromptTooLong, QueueFull, RequestError, Unavailable
from engine.log import get_logger
from router.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)

log = get_logger("router")

_FIELDS = frozenset(
    name
    for kind in (ChatRequest, CompletionRequest, EmbeddingRequest, RerankRequest, ScoreRequest)
    for name in kind.__struct_fields__
)

MOST_CHARACTERS = 2000  # of a message: what was sent may be in it, whatever its size
# Where a worker is: for the log, and for programs of the cluster, but for no client.
_PLACE = re.compile(r", pid \d+ on [^\s)]+")


class ErrorInfo(msgspec.Struct, kw_only=True):
    """What went wrong. ``param`` is the field that is to blame, ``code`` one for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """The body of every answer that is an error, and of an error event in a stream."""

    error: ErrorInfo


class ApiError(Exception):
    """An answer that is an error: its status, its body and further headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if len(message) > MOST_CHARACTERS:
            message = message[:MOST_CHARACTERS] + "..."
        super().__init__(message)
        self.status = status
        self.info = ErrorInfo(message=message, type=type, param=param, code=code)
        self.headers = headers or {}

    def body(self) -> bytes:
        """The body as JSON."""
        return msgspec.json.encode(ErrorResponse(self.info))


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is: 400."""
    return ApiError(400, message, param=param, code=code)


def wrong_at(where: str, what: str) -> ApiError:
    """400 for a field or a part of one, whose place begins the message."""
    return wrong(f"{where} {what}", where)


def too_long(most: int, has: str, param: str) -> ApiError:
    """A prompt does not fit ``most`` tokens: 400. It ``has`` so many, and what else is asked for.

    LangChain looks for the code in the text.
    """
    return wrong(
        f"This model's maximum context length is {most} tokens. However, the {param} has {has}."
        f" Please reduce the length of the {param} or of the output (context_length_exceeded).",
        param,
        "context_length_exceeded",
    )


def unavailable(message: str, code: str) -> ApiError:
    """Nothing is wrong with the request, but it cannot be served now: 503, to be sent again."""
    return ApiError(503, message, type="server_error", code=code)


def client_closed() -> ApiError:
    """What is answered, and counted, where the client has gone."""
    return ApiError(499, "the client closed the request", code="client_closed_request")


def api_error(error: BaseException, retry_after: int = 1) -> ApiError:
    """The answer to an exception; one that nobody foresaw is logged and not shown.

    retry_after: seconds after which what cannot be served now should be sent again.
    """
    answer = _answer(error)
    if answer.status in (429, 503):
        answer.headers["retry-after"] = str(retry_after)
    return answer


@contextlib.contextmanager
def blaming(fields: Mapping[str, str]) -> Iterator[None]:
    """What the block blames on one of ``fields`` is blamed on what that is called in the request.

    Raises ApiError for ApiError and RequestError.
    """
    try:
        yield
    except (ApiError, RequestError) as error:
        answer = api_error(error)
        answer.info.param = fields.get(answer.info.param or "", answer.info.param)
        raise answer from None


def _answer(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            f"too many requests wait already: {error}",
            type="rate_limit_error",
            code="rate_limit_exceeded",
        )
    if isinstance(error, PromptTooLong):
        return wrong(str(error), "prompt", "context_length_exceeded")
    if isinstance(error, RequestError):
        return wrong(str(error), field_of(str(error)))
    if isinstance(error, Unavailable):
        return unavailable(str(error), error.code)
    if isinstance(error, EngineError):
        cause = _PLACE.sub("", str(error).partition("\n")[0])
        return unavailable(cause.removesuffix(":"), "engine_unavailable")
    if isinstance(error, RecursionError):
        return wrong("the request has values that are nested too deeply")
    log.error("a request failed unexpectedly", exc_info=error)
    return ApiError(500, "the server failed on this request", type="server_error")


def field_of(message: str) -> str | None:
    """The field that a RequestError names, which is the message's first word; None for none."""
    match = re.match(r"[a-z_0-9]+", message)
    return match[0] if match and match[0] in _FIELDS else None
