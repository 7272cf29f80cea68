"""An error as the API has it that a request's path belongs to."""

from starlette.responses import Response
from starlette.types import Scope

from router.errors import ApiError
from router.messages_errors import error_body
from router.scopes import path_of

_MESSAGES = "/v1/messages"


def error_response(error: ApiError, scope: Scope) -> Response:
    """The whole answer."""
    body = error_body(error) if path_of(scope).startswith(_MESSAGES) else error.body()
    return Response(body, error.status, error.headers, "application/json")
