"""One-way channels of bytes for the step path: a ring in shared memory on one host, else a socket.

A message takes as long as waking a sleeping reader does (a futex), whatever the number of readers.
The ring's memory has no name: it is an anonymous file that readers open through /proc, so nothing
can be left behind, whoever is killed when.
"""

import contextlib
import ctypes
import mmap
import os
import platform
import select
import socket
import struct
import sys
import time
from typing import Protocol

_LENGTH = struct.Struct("<Q")
_HEADER = 4096  # a page: wake word, head, then a tail for each reader, each in its cache line
_LINE = 64
MAX_READERS = _HEADER // _LINE - 2
_FUTEX = {"x86_64": 202}
_WAIT, _WAKE = 0, 1
_CLOSED = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
_FULL_PAUSE = 20e-6  # seconds between looks at a full ring


class ChannelClosed(Exception):
    """The other end is gone, or this one was closed."""


class Sender(Protocol):
    """The writing end."""

    def send(self, data: bytes | memoryview) -> None:
        """Send one message; raises ChannelClosed."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """The reading end."""

    def receive(self, timeout: float | None = None) -> bytearray | None:
        """The next message; None if there is none within ``timeout`` seconds.

        Raises ChannelClosed.
        """
        ...

    def close(self) -> None: ...


def rings_work() -> bool:
    """Whether this machine can have rings: Linux, and a processor that keeps stores in order."""
    return sys.platform == "linux" and platform.machine() in _FUTEX


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class _Memory:
    """A ring's mapped memory: ``wake`` (futex word), ``head`` and ``tails`` count bytes."""

    def __init__(self, file: int) -> None:
        self.map = mmap.mmap(file, 0)
        self.wake = ctypes.c_uint32.from_buffer(self.map, 0)
        self.head = ctypes.c_uint64.from_buffer(self.map, _LINE)
        self.tails = [
            ctypes.c_uint64.from_buffer(self.map, (2 + i) * _LINE) for i in range(MAX_READERS)
        ]
        self.wake_at = ctypes.addressof(self.wake)
        self.capacity = len(self.map) - _HEADER
        self.data = memoryview(self.map)[_HEADER:]
        self._futex = _FUTEX[platform.machine()]

    def rouse(self) -> None:
        """Wake every sleeping reader."""
        self.wake.value += 1
        _syscall(self._futex, ctypes.c_void_p(self.wake_at), _WAKE, 1 << 30, None, None, 0)

    def sleep(self, seen: int, seconds: float) -> None:
        """Sleep until woken, unless the wake word is no longer ``seen``."""
        whole = int(seconds)
        until = _Timespec(whole, int((seconds - whole) * 1e9))
        at = ctypes.c_void_p(self.wake_at)
        _syscall(self._futex, at, _WAIT, seen, ctypes.byref(until), None, 0)


class RingSender:
    """Writes to every one of ``readers``; a message may be larger than the ring."""

    def __init__(self, readers: int, capacity: int) -> None:
        assert readers <= MAX_READERS
        self._file = os.memfd_create("manta-ring", os.MFD_CLOEXEC)
        os.ftruncate(self._file, _HEADER + capacity)
        self._memory = _Memory(self._file)
        self._tails = self._memory.tails[:readers]
        self._head = 0
        self._closed = False

    @property
    def path(self) -> str:
        """Where another process of this host and user opens it while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def send(self, data: bytes | memoryview) -> None:
        if self._closed:
            raise ChannelClosed
        memory, tails, capacity = self._memory, self._tails, self._memory.capacity
        for left in (memoryview(_LENGTH.pack(len(data))), memoryview(data)):
            while left:
                room = capacity - (self._head - min(tail.value for tail in tails))
                if not room:
                    self._publish(memory)
                    time.sleep(_FULL_PAUSE)
                    if self._closed:
                        raise ChannelClosed
                    continue
                at = self._head % capacity
                count = min(room, len(left), capacity - at)
                memory.data[at : at + count] = left[:count]
                self._head += count
                left = left[count:]
        self._publish(memory)

    def _publish(self, memory: _Memory) -> None:
        if memory.head.value != self._head:
            memory.head.value = self._head
            memory.rouse()

    def close(self) -> None:
        """Give up, also a ``send`` that waits in another thread. Readers keep what was sent."""
        if not self._closed:
            self._closed = True
            os.close(self._file)
            del self._memory, self._tails


class RingReceiver:
    """Reader number ``reader`` of the ring at ``path``. It looks ``spin`` times, then sleeps; each
    look takes the interpreter from this process's other threads.

    Raises OSError if this process cannot open it: another host, user or container.
    """

    def __init__(self, path: str, reader: int = 0, spin: int = 0) -> None:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = _Memory(file)
        finally:
            os.close(file)
        self._tail = self._memory.tails[reader]
        self.spin = spin
        self._at = 0
        self._length: int | None = None
        self._data = bytearray()
        self._closed = False

    def receive(self, timeout: float | None = None) -> bytearray | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ready = self._wait(deadline)
            if not ready:
                return None
            if self._length is None:
                if ready < _LENGTH.size:  # the writer is in the middle of it
                    continue
                self._length = _LENGTH.unpack(self._take(_LENGTH.size))[0]
                self._data = bytearray()
                ready -= _LENGTH.size
            more = self._take(min(ready, self._length - len(self._data)))
            self._data = self._data + more if self._data else more
            if len(self._data) == self._length:
                self._length = None
                return self._data

    def _wait(self, deadline: float | None) -> int:
        """How many bytes are there; 0 after the deadline."""
        memory, spins = self._memory, self.spin
        while True:
            seen = memory.wake.value
            ready = memory.head.value - self._at
            if ready:
                return ready
            if self._closed:
                raise ChannelClosed
            left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if left <= 0:
                return 0
            if spins:
                spins -= 1
                os.sched_yield()  # whoever is waited for may want this core
                continue
            memory.sleep(seen, left)

    def _take(self, count: int) -> bytearray:
        memory = self._memory
        at = self._at % memory.capacity
        taken = bytearray(memory.data[at : at + count])
        if len(taken) < count:
            taken += memory.data[: count - len(taken)]
        self._at += count
        self._tail.value = self._at
        return taken

    def close(self) -> None:
        """Give up, also a ``receive`` that waits in another thread."""
        self._closed = True
        self._memory.rouse()


class SocketChannel:
    """Both ends of a channel over a connected socket, which becomes this object's own."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(True)
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def fileno(self) -> int:
        """The socket's, to be polled."""
        return self._socket.fileno()

    @property
    def peer(self) -> str:
        """The other end's address."""
        return str(self._socket.getpeername()[0])

    @property
    def ended(self) -> bool:
        """Whether the other end is closed, whatever it sent before."""
        poll = select.poll()
        poll.register(self._socket, _CLOSED)
        return bool(poll.poll(0))

    def send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout: float | None = None, most: int | None = None) -> bytearray | None:
        """The next message; a longer one than ``most`` bytes is as good as a closed channel."""
        deadline = None if timeout is None else time.monotonic() + timeout
        buffer = self._buffer
        while True:
            if len(buffer) >= _LENGTH.size:
                length = _LENGTH.unpack_from(buffer)[0]
                if most is not None and length > most:
                    raise ChannelClosed(f"a message of {length} bytes, {most} are allowed")
                end = _LENGTH.size + length
                if len(buffer) >= end:
                    data = buffer[_LENGTH.size : end]
                    del buffer[:end]
                    return data
            left = None if deadline is None else max(0, deadline - time.monotonic()) * 1e3
            try:
                if not self._poll.poll(left):
                    return None
                part = self._socket.recv(1 << 20)
            except (OSError, ValueError) as error:
                raise ChannelClosed(str(error)) from error
            if not part:
                raise ChannelClosed("the other end is gone")
            buffer += part

    def close(self) -> None:
        """Close the socket; a ``receive`` that waits in another thread ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def open_channel(host: str, port: int, timeout: float = 30.0) -> SocketChannel:
    """A channel to a listening socket. Raises OSError."""
    return SocketChannel(socket.create_connection((host, port), timeout))
