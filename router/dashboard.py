"""GET /dashboard: a page with live plots of the server, and a playground for its model.

The page itself is static files, open to everybody; what it shows and asks for is guarded by the API
key, for which a login gives a session (router/sessions.py).
"""

from functools import cache
from pathlib import Path

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from router.bodies import receive_body
from router.errors import ApiError
from router.guard import Keys
from router.service import Service
from router.sessions import Sessions, forget
from router.states import engine_states

PATH = "/dashboard"
FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
NOT_KEPT = {"cache-control": "no-store"}
# What the page plots; the names that /metrics has under a prefix.
SHOWN = frozenset({
    "generation_tokens", "prompt_tokens", "prompt_tokens_cached", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "step_time_seconds", "num_requests_running",
    "num_requests_waiting", "kv_blocks", "kv_blocks_used", "cpu_kv_blocks", "cpu_kv_blocks_used",
    "prefix_cache_queries", "prefix_cache_hits", "preemptions_by_kind", "request_success",
    "http_requests", "requests_moved",
})  # fmt: skip


class Login(msgspec.Struct):
    """The body of a login."""

    key: str


@cache
def files() -> dict[str, tuple[bytes, str]]:
    """The page's files, with their types."""
    return {p.name: (p.read_bytes(), TYPES[p.suffix]) for p in sorted(FOLDER.iterdir())}


def open_paths() -> set[str]:
    """What nobody needs a key for."""
    return {PATH, f"{PATH}/login", f"{PATH}/session", *(f"{PATH}/{name}" for name in files())}


class Dashboard:
    """The page's routes."""

    def __init__(self, service: Service, version: str) -> None:
        config = service.config
        self._service = service
        self._version = version
        self._keys = config.api_key
        self._sessions = Sessions(config.api_key)
        self._root = f"{config.root_path.rstrip('/')}/"
        self._https = config.ssl_certfile is not None

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to the application."""
        for method, path, endpoint in (
            ("GET", "", self.page),
            ("GET", "/data", self.data),
            ("GET", "/session", self.session),
            ("POST", "/login", self.login),
            ("POST", "/logout", self.logout),
            ("GET", "/{name}", self.file),
        ):
            app.add_api_route(PATH + path, endpoint, methods=[method], response_model=None)

    async def page(self) -> Response:
        """The page."""
        return await self.file("index.html")

    async def file(self, name: str) -> Response:
        """One of the page's files."""
        if name not in files():
            raise HTTPException(404, "Not Found")
        data, kind = files()[name]
        return Response(data, headers=HEADERS, media_type=kind)

    async def data(self) -> Response:
        """What the page plots: the metrics in ``SHOWN`` of every engine and ingress process."""
        sources = [
            {"labels": labels, "metrics": [metric for metric in metrics if metric.name in SHOWN]}
            for labels, metrics in await self._service.sources()
        ]
        answer = {
            "version": self._version,
            "engines": engine_states(self._service.engines),
            "sources": sources,
        }
        return Response(msgspec.json.encode(answer), 200, NOT_KEPT, "application/json")

    async def session(self, request: Request) -> Response:
        """Whether a key is needed, and whether this browser has a session instead."""
        guarded = bool(self._keys)
        known = not guarded or self._sessions.accepts(request.scope)
        answer = {"guarded": guarded, "signed_in": known}
        return Response(msgspec.json.encode(answer), 200, NOT_KEPT, "application/json")

    async def login(self, request: Request) -> Response:
        """A session for an API key. Raises ApiError: 400 for another body, 401 for a wrong key."""
        try:
            login = msgspec.json.decode(await receive_body(request, self._service), type=Login)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise ApiError(400, 'the body must be {"key": "..."}', param="key") from None
        if self._keys and not Keys(self._keys).known(login.key.encode()):
            raise ApiError(401, "the API key is wrong", code="invalid_api_key")
        cookie = self._sessions.cookie(self._root, self._secure(request))
        return Response(status_code=204, headers={"set-cookie": cookie})

    async def logout(self, request: Request) -> Response:
        """End the browser's session."""
        cookie = forget(self._root, self._secure(request))
        return Response(status_code=204, headers={"set-cookie": cookie})

    def _secure(self, request: Request) -> bool:
        """Whether the browser has come by HTTPS, to the server or to a proxy before it."""
        return self._https or request.headers.get("x-forwarded-proto") == "https"
