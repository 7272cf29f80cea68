"""Tokens beside Ray: one TCP connection for each client process and engine, all requests in it.

A message is its length (4 bytes, little endian) and MessagePack (``engine.wire``). The engine's
own loop writes to the sockets after each step, so a token passes no queue and no further thread on
its way out. A process that dies closes its connections, which the other side sees at once; a host
that vanishes is noticed by TCP's keep-alive within ``HOST_TIMEOUT`` seconds. While a step keeps the
loop, the server's thread says each second for how long: an engine hangs when that is too long, and
a process (stopped, or its host frozen) when it says nothing.

Whoever connects is a stranger until it has shown the key: it may send ``KEY_BYTES``, it has
``KEY_SECONDS``, and of too many the oldest goes.
"""

import asyncio
import contextlib
import errno
import hmac
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

import msgspec

from cluster.attempts import Attempt, AttemptTable
from cluster.client import EngineInfo, EngineLoad, Sink
from cluster.loop import EngineLoop
from cluster.messages import AtWork, Command, Drain, EndRequests, Greeting, Report, Update
from engine import wire
from engine.addresses import address_family, host_port
from engine.continuation import Continuation
from engine.errors import EngineError
from engine.log import get_logger
from engine.stats import Metric

log = get_logger("transport")

HOST_TIMEOUT = 3  # seconds until a host that says nothing is taken for dead
CLIENT_TIMEOUT = 60  # seconds that a client may read nothing: it may be busy with what it has
BEAT = 1.0  # a step that takes longer is told of so often, in seconds
SILENCE = 10.0  # seconds until a process that says nothing is taken to hang
MOST_BYTES = 1 << 28  # of one message
KEY_BYTES = 1 << 10  # of the first message, which is the key
KEY_SECONDS = 5.0  # until a connection has shown the key
MOST_STRANGERS = 128  # connections that have not
MOST_UNREAD = 1 << 26  # bytes that a client may leave unread
_LENGTH = struct.Struct("<I")
_READ = selectors.EVENT_READ
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # for another connection


def _frame(value: object) -> bytes:
    data = wire.encode(value)
    return _LENGTH.pack(len(data)) + data


class _Reader:
    """Cuts a stream of bytes into messages of at most ``most`` bytes.

    What came of an unfinished message is kept in a buffer that grows, so that a message in many
    pieces costs no more than its bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._rest = bytearray()
        self._needed = _LENGTH.size  # bytes that ``_rest`` must have before there is more to do

    def take(self, data: bytes) -> Iterator[memoryview]:
        """The messages that ``data`` completes. Raises ValueError for a length over ``most``."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
        view, at = memoryview(data), 0
        self._needed = _LENGTH.size
        while len(data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > self.most:
                raise ValueError(f"a message of {length} bytes, of which {self.most} are allowed")
            end = at + _LENGTH.size + length
            if end > len(data):
                self._needed = end - at
                break
            yield view[at + _LENGTH.size : end]
            at = end
        self._rest = bytearray(view[at:])


def _prepare(sock: socket.socket, unread_timeout: float) -> None:
    """No delay for small messages; a peer whose host vanished is noticed.

    unread_timeout: seconds that the peer has to acknowledge what is sent or, which to TCP is the
        same, to read it.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 1),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", HOST_TIMEOUT - 1),
        ("TCP_USER_TIMEOUT", int(unread_timeout * 1000)),
    ):
        if hasattr(socket, name):  # not every system has each
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Server:
    """Lets clients in other processes use a loop's engine; closes with the loop.

    A thread of its own accepts and reads, so that no client waits at the door, or finds its
    connection full, for as long as a step takes. ``address`` is what clients need: host, port and
    a key that keeps others out.
    """

    def __init__(self, loop: EngineLoop, info: EngineInfo, key: str, host: str = "127.0.0.1"):
        self._loop = loop
        self._info = info
        self._key = key.encode()
        self._listener = socket.create_server((host, 0), family=address_family(host))
        self._listener.setblocking(False)
        self.address = f"{host} {self._listener.getsockname()[1]} {key}"
        self.selector = selectors.DefaultSelector()  # for the server's thread
        self._awake, self._waker = socket.socketpair()
        self._awake.setblocking(False)
        self._waker.setblocking(False)
        # For the server's thread: who has shown the key, and until when the others may.
        self.clients: set[_Connection] = set()
        self._strangers: dict[_Connection, float] = {}  # the oldest first
        self._refused = 0  # strangers let go since the log was told
        self._full = False  # nobody is let in until there is room
        self._posted: deque[Callable[[], None]] = deque()
        self._stopping = False
        self.selector.register(self._listener, _READ, self._accept)
        self.selector.register(self._awake, _READ, self._run_posted)
        self._thread = threading.Thread(target=self._run, name="manta-transport", daemon=True)
        self._thread.start()
        loop.at_end(self._close)

    def post(self, call: Callable[[], None]) -> None:
        """Have ``call`` run in the server's thread; thread-safe."""
        self._posted.append(call)
        with contextlib.suppress(BlockingIOError, OSError):  # full: it will wake anyhow
            self._waker.send(b"\0")

    # ---- in the server's thread ----

    def _run(self) -> None:
        beat = time.monotonic() + BEAT
        while not self._stopping:
            for key, events in self.selector.select(max(0.0, beat - time.monotonic())):
                key.data(events)
            if time.monotonic() >= beat:
                self._beat()
                self._watch_door()
                beat = time.monotonic() + BEAT
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._listener.close()
        self.selector.close()
        self._waker.close()

    def _run_posted(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._awake.recv(4096):
                pass
        while self._posted:
            self._posted.popleft()()

    def _beat(self) -> None:
        """Where a step, or starting workers again, keeps the loop from writing, say so."""
        seconds = self._loop.step_seconds
        if seconds >= BEAT or self._loop.recovering:
            data = _frame(AtWork(seconds))
            for connection in self.clients:
                connection.send(data)

    def _watch_door(self) -> None:
        """Let strangers go who are late, and others in again if there was no room."""
        now = time.monotonic()
        for stranger in [one for one, until in self._strangers.items() if until <= now]:
            stranger.close()
        if self._refused:
            log.warning("%d connections did not show the key, and were let go", self._refused)
            self._refused = 0
        if self._full:
            self._full = False
            self.selector.register(self._listener, _READ, self._accept)

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # it would be called again at once, and again
                log.warning("A client cannot connect: %s", error.strerror)
                self.selector.unregister(self._listener)
                self._full = True
            return  # else the client went away again
        try:
            _prepare(sock, CLIENT_TIMEOUT)
        except OSError:
            sock.close()
            return
        sock.setblocking(False)
        if len(self._strangers) >= MOST_STRANGERS:
            next(iter(self._strangers)).close()
        connection = _Connection(sock, self, self._loop)
        self._strangers[connection] = time.monotonic() + KEY_SECONDS
        self.selector.register(sock, _READ, connection.ready)

    def greet(self, connection: "_Connection", key: memoryview) -> bytes:
        """What a stranger that shows the key is told first. Raises ValueError for a wrong one."""
        if not hmac.compare_digest(key, self._key):
            raise ValueError("its first message is not the key")
        del self._strangers[connection]
        self.clients.add(connection)
        return _frame(Greeting(self._info, self._loop.load))

    def forget(self, connection: "_Connection") -> None:
        """A connection has been closed."""
        self.clients.discard(connection)
        self._refused += self._strangers.pop(connection, None) is not None

    # ---- in the loop's thread ----

    def _close(self) -> None:
        self.post(self._stop)
        self._thread.join()

    def _stop(self) -> None:
        self._stopping = True


class _Connection:
    """The server's side of one client; a ``Peer`` of the loop once it has shown the key.

    The server's thread reads and closes. The loop's thread writes; what the socket does not take
    at once is left to the server's thread.
    """

    def __init__(self, sock: socket.socket, server: Server, loop: EngineLoop) -> None:
        self._socket = sock
        self._server = server
        self._loop = loop
        self._known = False
        self._reader = _Reader(KEY_BYTES)
        self._decoder: wire.Decoder[Command] = wire.Decoder(Command)
        self._writing = threading.Lock()  # guards what follows, and the socket's end
        self._unsent = bytearray()
        self._open = True

    def deliver(self, update: Update) -> None:
        self.send(_frame(update))

    def ready(self, events: int) -> None:
        """The socket can be read or written; in the server's thread."""
        if self._socket.fileno() < 0:
            return  # it was closed after the event
        if events & selectors.EVENT_WRITE:
            self._send_rest()
        if not events & _READ:
            return
        try:
            while data := self._socket.recv(1 << 18):
                for message in self._reader.take(data):
                    self._take(message)
                if len(data) < 1 << 18:
                    return
        except BlockingIOError:
            return
        except (msgspec.MsgspecError, ValueError) as error:
            if self._known:
                log.warning("A client sent what cannot be read, and is let go: %s", error)
        except OSError:
            pass
        self.close()

    def _take(self, message: memoryview) -> None:
        if self._known:
            command = self._decoder.decode(message)
            self._loop.post(lambda: self._loop.take(self, command))
            return
        hello = self._server.greet(self, message)
        self._known = True
        self._reader.most = MOST_BYTES
        self.send(hello)
        self._loop.post(lambda: self._loop.join(self))

    def send(self, data: bytes) -> None:
        """Write a message, or what the socket takes of it; thread-safe."""
        with self._writing:
            if not self._open:
                return
            if not self._unsent:
                sent = self._write(data)
                if sent == len(data):
                    return
                data = data[sent:]
                self._server.post(self._rewatch)
            self._unsent += data
            if len(self._unsent) > MOST_UNREAD:
                log.warning("A client leaves %d bytes unread, and is let go", len(self._unsent))
                self._break_off()

    def _send_rest(self) -> None:
        with self._writing:
            with memoryview(self._unsent) as view:
                sent = self._write(view[: 1 << 20])
            del self._unsent[:sent]
        self._rewatch()

    def _rewatch(self) -> None:
        with self._writing:
            if self._open:
                more = selectors.EVENT_WRITE if self._unsent else 0
                self._server.selector.modify(self._socket, _READ | more, self.ready)

    def _write(self, data: bytes | memoryview) -> int:
        """How many bytes of it the socket took."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._break_off()
            return len(data)

    def _break_off(self) -> None:
        """Send nothing any longer, and have the server's thread see the end."""
        self._open = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it, and forget its client; in the server's thread."""
        with self._writing:
            self._open = False
            self._server.selector.unregister(self._socket)
            self._socket.close()
        self._server.forget(self)
        if self._known:
            self._loop.post(lambda: self._loop.leave(self))


class RemoteClient(asyncio.Protocol):
    """An ``EngineClient`` of an engine in another process; make it with ``open``."""

    info: EngineInfo

    def __init__(self, address: str) -> None:
        self._address = address
        self._table = AttemptTable(self._send)
        self._reader = _Reader(MOST_BYTES)
        self._decoder: wire.Decoder[Report] = wire.Decoder(Report)
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None  # the same connection, to be read to its end
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard = self._checked = time.monotonic()
        self._step_seconds = 0.0  # of the step that runs at the engine, as it said last
        self._watch: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, address: str, timeout: float = 10.0) -> "RemoteClient":
        """Connect to a ``Server.address``. Raises EngineError if nothing answers there."""
        host, port, key = address.split()
        loop = asyncio.get_running_loop()
        client = cls(address)
        try:
            async with asyncio.timeout(timeout):
                await loop.create_connection(lambda: client, host, int(port))
                client._write(_LENGTH.pack(len(key)) + key.encode())
                await client._greeted
        except BaseException as error:
            await client.close()
            if not isinstance(error, OSError | TimeoutError):
                raise
            why = f"nothing within {timeout:g} s" if isinstance(error, TimeoutError) else error
            where = host_port(host, int(port))
            raise EngineError(f"no engine answers at {where}: {why}") from error
        client._check_progress()
        return client

    @property
    def load(self) -> EngineLoad:
        return self._table.load

    @property
    def healthy(self) -> bool:
        return self._table.failure is None  # one that hangs is let go

    async def submit(self, request: Continuation, sink: Sink) -> Attempt:
        return await self._table.submit(request, sink)

    async def stats(self) -> list[Metric]:
        return await self._table.stats()

    def drain(self) -> None:
        """Have the engine admit nothing any longer, as its whole server shuts down; ``load`` says
        when it is done."""
        self._send(Drain())

    def leave(self) -> None:
        """Have the engine admit nothing any longer, its clients take what it has elsewhere, if
        there is another, and its process end when it has nothing left."""
        self._send(Drain(leave=True))

    def end_requests(self, cause: str) -> None:
        """Have the engine end all that it still has, of every client, for this cause."""
        self._send(EndRequests(cause))

    async def close(self) -> None:
        """Close the connection; the engine ends the requests that are still in flight."""
        self._end("the connection was closed")

    # ---- inside ----

    def _send(self, command: Command) -> None:
        self._write(_frame(command))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _check_progress(self) -> None:
        now = time.monotonic()
        if now - self._checked > 2 * BEAT:  # we slept ourselves: what it sent is still to be read
            self._heard = now
        self._checked = now
        silence, step = now - self._heard, self._step_seconds
        if silence >= SILENCE:
            self._lose(f"{self._name} hangs: its process has said nothing for {silence:.1f} s")
        elif step >= self.info.step_timeout:
            self._lose(f"{self._name} hangs: it has finished no step for {step:.1f} s")
        elif self.healthy:
            loop = asyncio.get_running_loop()
            self._watch = loop.call_later(BEAT / 2, self._check_progress)

    @property
    def _name(self) -> str:
        return f"the engine {self.info.engine_id}" if hasattr(self, "info") else "an engine"

    def _lose(self, cause: str) -> None:
        """End the connection for a cause of which clients are told, without the address."""
        if self.healthy:
            host, port, _ = self._address.split()
            log.warning("At %s: %s", host_port(host, int(port)), cause)
        self._end(cause)

    def _end(self, cause: str) -> None:
        self._table.fail(cause)
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _read_rest(self) -> None:
        """Take in what came before the end: asyncio throws it away when a write fails."""
        if (connection := self._socket) is not None:
            with contextlib.suppress(OSError):
                while data := connection.recv(1 << 18):
                    self.data_received(data)

    # ---- asyncio calls these ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one but does not say so
        connection = transport.get_extra_info("socket")
        _prepare(connection, HOST_TIMEOUT)
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        try:
            for piece in self._reader.take(data):
                message = self._decoder.decode(piece)
                self._step_seconds = 0.0
                if isinstance(message, Update):
                    self._table.receive(message)
                elif isinstance(message, AtWork):
                    self._step_seconds = message.step_seconds
                elif not self._greeted.done():
                    self.info, self._table.load = message.info, message.load
                    self._greeted.set_result(None)
        except (msgspec.MsgspecError, ValueError) as error:
            self._lose(f"{self._name} sent what cannot be read: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        if not self._greeted.done():
            self._greeted.set_exception(ConnectionError("it closed the connection"))
            return
        if error is not None:
            self._read_rest()
        why = f": {error}" if error is not None else ""
        self._lose(f"{self._name} is gone: its connection broke{why}")
