"""A lean asyncio HTTP/1.1 client for streamed answers, to measure a server with little CPU.

One connection carries one request at a time and is kept for the next. Nothing is parsed that a
benchmark does not need: the status line, the headers, chunks, and the ``data:`` of events.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

OnEvent = Callable[[bytes, float], None]


class BrokenStream(ConnectionError):
    """The connection ended before the answer did."""


@dataclass
class Answer:
    """The end of a request. ``body`` is empty when the answer was a stream of events."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class HttpClient:
    """Connections to one server, made as needed and kept.

    url: scheme, host and port, and a path that comes before every request's.
    verify: whether a certificate must be valid.
    """

    def __init__(self, url: str, headers: dict[str, str] | None = None, verify: bool = True):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a URL like http://host:port, not {url!r}")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context()
            if not verify:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        self._path = parts.path.rstrip("/")
        fields = {"Host": parts.netloc, "Content-Type": "application/json", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[_Connection] = []

    async def request(
        self, method: str, path: str, body: bytes = b"", on_event: OnEvent | None = None
    ) -> Answer:
        """Send a request and wait for the end of its answer.

        on_event is called with the data of each server-sent event and when it came
        (``time.perf_counter``). Cancelling closes the connection, which tells the server.

        Raises ConnectionError (BrokenStream in the middle of an answer) or OSError.
        """
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}"
        message = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        while True:
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else await self._connect()
            try:
                answer = await connection.exchange(message, on_event)
            except BrokenStream:
                connection.close()
                if kept and not connection.answering:
                    continue  # the server had closed it while it was idle
                raise
            except BaseException:
                connection.close()
                raise
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(_Connection, self.host, self.port, ssl=self._tls)
        return protocol

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._closed = False
        self.answering = False
        self.reusable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._closed = True
        if self._done is None or self._done.done():
            return
        if self._answer is not None and self._until_close:
            self.reusable = False
            self._finish()
        else:
            reason = f": {error}" if error else ""
            self._done.set_exception(BrokenStream(f"the server closed the connection{reason}"))

    async def exchange(self, message: bytes, on_event: OnEvent | None) -> Answer:
        self.answering = False
        if self._closed or self._transport is None:
            raise BrokenStream("the server closed the connection")
        self._done = asyncio.get_running_loop().create_future()
        self._on_event = on_event
        self._answer: Answer | None = None
        self._buffer = b""  # what is not understood yet
        self._body = b""  # of the answer, or of an event that is not complete
        self._length = 0  # of the body that is missing, without chunks
        self._chunked = self._until_close = self._events = False
        self._transport.write(message)
        return await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.answering = True
        self._buffer += data
        if self._answer is None and not self._read_head():
            return
        if self._chunked:
            self._read_chunks()
        else:
            piece, self._buffer = self._buffer, b""
            self._body += piece
            self._length -= len(piece)
        if self._events:
            self._give_events(now)
        if self._done is not None and not self._done.done():
            complete = self._chunked and self._length < 0
            if complete or not (self._chunked or self._until_close or self._length > 0):
                self._finish()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        self._buffer = self._buffer[end + 4 :]
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        self._answer = Answer(int(lines[0].split(" ", 2)[1]), headers)
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._until_close = not self._chunked and "content-length" not in headers
        self._length = int(headers.get("content-length", 0))
        self._events = headers.get("content-type", "").startswith("text/event-stream")
        self.reusable = headers.get("connection", "").lower() != "close" and not self._until_close
        return True

    def _read_chunks(self) -> None:
        """Move whole chunks from the buffer to the body; ``_length`` is -1 after the last."""
        buffer, at = self._buffer, 0
        pieces = [self._body]
        while True:
            line_end = buffer.find(b"\r\n", at)
            if line_end < 0:
                break
            size = int(buffer[at:line_end].split(b";", 1)[0], 16)
            end = line_end + 2 + size
            if len(buffer) < end + 2:
                break
            if size == 0:
                self._length = -1
            else:
                pieces.append(buffer[line_end + 2 : end])
            at = end + 2
        self._buffer = buffer[at:]
        self._body = b"".join(pieces)

    def _give_events(self, now: float) -> None:
        if b"\r" in self._body:
            self._body = self._body.replace(b"\r\n", b"\n")
        *events, self._body = self._body.split(b"\n\n")
        if self._on_event is None:
            return
        for event in events:
            if event.startswith(b"data:"):
                self._on_event(event[5:].strip(), now)

    def _finish(self) -> None:
        assert self._answer is not None and self._done is not None
        self._answer.body = b"" if self._events else self._body
        self._done.set_result(self._answer)
