"""Around every route: where the application is, the API key, and errors nobody foresaw."""

import hashlib
import hmac
import re
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.error_shapes import error_response
from router.errors import ApiError, api_error, wrong
from router.scopes import header_of, key_of, path_of
from router.sessions import Sessions

OPEN_PATHS = ("/health", "/metrics")
REQUEST_ID = b"x-request-id"
_ID = re.compile(rb"[!-~]{1,256}")


class RootPath:
    """ASGI middleware: the application is served under a path, by a proxy that may strip it."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app = app
        self._path = path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._path
        await self._app(scope, receive, send)


class Head:
    """ASGI middleware: HEAD is GET without the body (RFC 9110, 9.3.2), as monitors ask it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        await self._app({**scope, "method": "GET"}, receive, without_body)


class Unforeseen:
    """ASGI middleware: answers an exception that no route foresaw. Starlette itself would do so
    outside all other middleware, where the answer is not counted and has no CORS headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if started:
                raise
            await error_response(api_error(error), scope)(scope, receive, send)


class RequestId:
    """ASGI middleware: an answer has the X-Request-Id of its request, if it has none of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = None if scope["type"] != "http" else header_of(scope, REQUEST_ID)
        if given is None:
            await self._app(scope, receive, send)
            return

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if all(name != REQUEST_ID for name, _ in headers):
                    message = {**message, "headers": [*headers, (REQUEST_ID, given)]}
            await send(message)

        await self._app(scope, receive, named)


class OldHttp:
    """ASGI middleware: a client of HTTP/1.0 gets a stream whole, with its length, since it does not
    know chunks (RFC 9112, section 7.1)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["http_version"] not in ("1.0", "0.9"):
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = bytearray()

        async def collected(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            body.extend(message.get("body", b""))
            if start is not None and not message.get("more_body", False):
                headers = [h for h in start.get("headers", ()) if h[0] != b"content-length"]
                length = (b"content-length", b"%d" % len(body))
                await send({**start, "headers": [*headers, length]})
                await send({"type": "http.response.body", "body": bytes(body)})
                start = None

        await self._app(scope, receive, collected)


def given_id(scope: Scope) -> str | None:
    """The request's X-Request-Id, to be used as its id. Raises ApiError for one that cannot be."""
    given = header_of(scope, REQUEST_ID)
    if given is not None and not _ID.fullmatch(given):
        raise wrong("X-Request-Id must be 1 to 256 visible characters of ASCII", "X-Request-Id")
    return None if given is None else given.decode()


class Keys:
    """The API keys, compared as digests, each with each, in a time that tells nothing of them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def known(self, key: bytes) -> bool:
        """Whether it is one of them."""
        digest = _digest(key.strip())
        return any([hmac.compare_digest(digest, known) for known in self._digests])


class KeyGuard:
    """ASGI middleware: lets nobody through without one of the keys or a session of the dashboard,
    but to ``open_paths``."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = Keys(keys)
        self._sessions = Sessions(keys)
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._open(scope):
            problem = self._problem(scope)
            if problem is not None:
                error = ApiError(
                    401, problem, code="invalid_api_key", headers={"www-authenticate": "Bearer"}
                )
                await error_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        return path_of(scope) in self._open_paths

    def _problem(self, scope: Scope) -> str | None:
        key = key_of(scope)
        if key is None:
            if self._sessions.accepts(scope):
                return None
            return "no API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
        return None if self._keys.known(key) else "the API key is wrong"


def client_of(scope: Scope, by_key: bool) -> str:
    """Who a request is from: the digest of its API key, or the address that HAProxy saw."""
    if not by_key:
        return client_address(scope)
    key = key_of(scope)
    return "" if key is None else _digest(key.strip()).hex()


def client_address(scope: Scope) -> str:
    """The address that a request is from; empty if nobody knows."""
    given = [value for header, value in scope["headers"] if header == b"x-forwarded-for"]
    if given:  # HAProxy's own comes last, whatever the client has sent
        return str(given[-1].rpartition(b",")[2].strip(), "latin-1")[:64]
    peer = scope.get("client")
    return peer[0] if peer else ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
