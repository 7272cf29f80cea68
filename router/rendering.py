"""Chat templates run in a process of their own, with a bound on its time and memory.

A template comes with a checkpoint, or with a request where the server trusts those. It may loop for
ever or build strings of gigabytes, which nothing inside a process can stop. So ``Renderer`` sends
what is to be rendered to a child (``python -m router.rendering``), which ends with its parent.
"""

import contextlib
import marshal
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO

import msgspec

from engine import chat
from engine.children import child_environment
from engine.errors import RequestError

CPU_SECONDS = 2.0  # of a rendering
WALL_SECONDS = 10.0  # after which the child is killed, whatever keeps it
MEMORY_BYTES = 1 << 30  # of the child's addresses, Python's own 100 MB among them
MOST_CHARACTERS = 1 << 26  # of a rendered prompt
_LENGTH = struct.Struct("<I")


class _Outcome(msgspec.Struct, array_like=True):
    text: str = ""
    error: str | None = None


class Renderer:
    """Renders as ``engine.chat.render`` does, in the child. Thread-safe; one at a time."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()

    def start(self) -> None:
        """Start the child, so that the first rendering does not wait for it."""
        with self._turn:
            self._running()

    def render(self, template: str, messages: Any, **options: Any) -> str:
        """The prompt that a template makes of messages.

        Raises RequestError as ``engine.chat.render`` does, and for a template that takes more
        time or memory than there is for it.
        """
        try:  # what JSON may hold, integers of any size included; the child trusts its parent
            call = marshal.dumps((template, messages, options))
        except ValueError:
            raise RequestError("messages: a value is nested too deeply") from None
        with self._turn:
            outcome = self._ask(call)
        if outcome.error is not None:
            raise RequestError(outcome.error)
        return outcome.text

    def stop(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    # ---- inside ----

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            self.stop()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "router.rendering"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is the server's business
            )
        return self._child

    def _ask(self, call: bytes) -> _Outcome:
        child = self._running()
        assert child.stdin is not None and child.stdout is not None
        deadline = time.monotonic() + WALL_SECONDS
        try:
            child.stdin.write(_LENGTH.pack(len(call)) + call)
            child.stdin.flush()
            answer = _receive(child.stdout.fileno(), deadline)
        except OSError:
            answer = None
        if answer is None:
            self.stop()
            return _Outcome(
                error="the chat template takes more time or memory than it may with these messages"
            )
        return msgspec.msgpack.decode(answer, type=_Outcome)


def _receive(file: int, deadline: float) -> bytes | None:
    """The next message; None if there is none before the deadline, or never."""
    data, needed = bytearray(), _LENGTH.size
    while len(data) < needed:
        ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(file, 1 << 20) if ready else b""
        if not part:
            return None
        data += part
        if needed == _LENGTH.size and len(data) >= needed:
            needed += _LENGTH.unpack_from(data)[0]
    return bytes(data[_LENGTH.size :])


# ---- the child ----


class _OutOfTime(BaseException):
    """Not an Exception, which a rendering would take for a refusal of the template's."""


def _out_of_time(number: int, frame: object) -> None:
    raise _OutOfTime


def _render(template: str, messages: Any, options: dict[str, Any]) -> _Outcome:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        text = chat.render(template, messages, **options)
        text.encode()
    except _OutOfTime:
        return _Outcome(error=f"the chat template takes longer than {CPU_SECONDS:g} s")
    except (MemoryError, RequestError) as error:
        if isinstance(error.__cause__ or error, MemoryError):
            return _Outcome(error=f"the chat template takes more than {MEMORY_BYTES >> 20} MiB")
        return _Outcome(error=str(error))
    except UnicodeEncodeError as error:
        return _Outcome(error=f"the chat template makes what is no valid Unicode: {error}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if len(text) > MOST_CHARACTERS:
        return _Outcome(error=f"the chat template makes more than {MOST_CHARACTERS} characters")
    return _Outcome(text)


def _serve(calls: BinaryIO, outcomes: BinaryIO) -> None:
    while len(head := calls.read(_LENGTH.size)) == _LENGTH.size:
        call = marshal.loads(calls.read(_LENGTH.unpack(head)[0]))
        answer = msgspec.msgpack.encode(_render(*call))
        outcomes.write(_LENGTH.pack(len(answer)) + answer)
        outcomes.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _out_of_time)
    _serve(sys.stdin.buffer, sys.stdout.buffer)
