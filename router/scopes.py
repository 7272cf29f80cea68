"""What an ASGI scope says of a request."""

from starlette.types import Scope


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """The first header of a name in lower case, if there is one."""
    return next((value for key, value in scope["headers"] if key == name), None)


def path_of(scope: Scope) -> str:
    """The path of a request, below the one where a proxy serves this."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def key_of(scope: Scope) -> bytes | None:
    """The API key that a request brings, empty if it does so in a way that is none; None without
    any. OpenAI's clients send it as a bearer's, Anthropic's so or as x-api-key."""
    given = header_of(scope, b"authorization")
    if given is None:
        return header_of(scope, b"x-api-key")
    kind, _, key = given.partition(b" ")
    return key if kind.lower() == b"bearer" else b""
