"""Errors of /v1/messages, in the shape that Anthropic's clients know."""

import msgspec

from router.errors import ApiError
from router.messages_shapes import MessagesError, MessagesErrorInfo

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> bytes:
    """The body as JSON."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    return msgspec.json.encode(MessagesError(MessagesErrorInfo(kind, error.info.message)))
