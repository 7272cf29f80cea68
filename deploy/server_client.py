"""A small client of an OpenAI-compatible server, for the command line: models, streamed answers."""

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine.errors import MantaError

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://localhost:8000/v1"
KEY_VARIABLES = ("MANTA_API_KEY", "OPENAI_API_KEY")


class ServerError(MantaError):
    """The server is not there, refused a request, or broke off; the message is the server's."""


def key_from_environment() -> str | None:
    """The API key of the environment, or None."""
    return next((key for name in KEY_VARIABLES if (key := os.environ.get(name))), None)


def error_text(body: bytes) -> str:
    """What a server's error says, whether its body has OpenAI's shape or not."""
    try:
        value = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip()
    for key in ("error", "message", "detail"):
        if isinstance(value, dict):
            value = value.get(key, value)
    return value if isinstance(value, str) else json.dumps(value)


class ServerClient:
    """One server, over one connection that is kept.

    url: the base URL, as OpenAI's clients take it (``http://localhost:8000/v1``).
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        headers: dict[str, str] | None = None,
        verify: bool = True,
    ) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise ServerError(f"the URL must start with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        key = api_key if api_key is not None else key_from_environment()
        headers = {**(headers or {}), **({} if key is None else {"Authorization": f"Bearer {key}"})}
        # An answer may take as long as it takes; a server that is not there is known at once.
        timeout = httpx.Timeout(None, connect=10)
        self._http = httpx.Client(headers=headers, timeout=timeout, verify=verify)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET a path, or POST a body to it; the JSON of the answer. Raises ServerError."""
        import httpx

        try:
            method = "GET" if body is None else "POST"
            response = self._http.request(method, self.url + path, json=body, timeout=60)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != 200:
            raise _refused(response)
        try:
            return response.json()
        except ValueError:
            raise ServerError(f"{self.url}{path} gave no JSON; is the URL right?") from None

    def first_model(self, path: str = "/models") -> str:
        """The name of the first model that the server has."""
        try:
            return str(self.call(path)["data"][0]["id"])
        except (LookupError, TypeError):
            message = f"{self.url}{path} is no list of models; is the URL right?"
            raise ServerError(message) from None

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Closing the iterator early makes the server stop.

        Raises ServerError, with what the server says.
        """
        import httpx

        body = {**body, "stream": True}
        try:
            with self._http.stream("POST", self.url + path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refused(response)
                yield from self._events(response)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _events(self, response: "httpx.Response") -> Iterator[dict[str, Any]]:
        for line in response.iter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ServerError(error_text(data.encode()))
            yield event
        raise ServerError("the server broke off in the middle of its answer")

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(f"no answer from {self.url}: {error or type(error).__name__}")


def _refused(response: "httpx.Response") -> ServerError:
    text = error_text(response.content) or response.reason_phrase
    return ServerError(f"the server answered {response.status_code}: {text}")
