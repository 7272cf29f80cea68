"""Processes of this machine, and those that they started."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_KILLED = 2.0  # seconds in which the system must have ended what was killed


class Process(NamedTuple):
    """A process; ``started`` (clock ticks since the boot) tells it from a later one of its id."""

    pid: int
    started: int

    @property
    def lives(self) -> bool:
        """Whether it is there, and no zombie."""
        found = _stat(self.pid)
        return found is not None and found[0] != "Z" and int(found[19]) == self.started


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie. It is not reaped."""
    found = _stat(pid)
    return found is not None and found[0] != "Z"


def descendants(pids: Iterable[int]) -> list[Process]:
    """The processes that these ones started, and those that they started."""
    children: dict[int, list[Process]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := _stat(int(entry))) is not None:
            process = Process(int(entry), int(found[19]))
            children.setdefault(int(found[1]), []).append(process)
    found_ones: list[Process] = []
    queue = list(pids)
    while queue:
        of_one = children.get(queue.pop(), ())
        found_ones += of_one
        queue += [process.pid for process in of_one]
    return found_ones


def end(processes: Iterable[Process], patience: float = 0.0) -> None:
    """Kill those that have not ended by themselves within ``patience`` seconds."""
    left = [process for process in processes if process.lives]
    deadline = time.monotonic() + patience
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [process for process in left if process.lives]
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + _KILLED
    while any(process.lives for process in left) and time.monotonic() < deadline:
        time.sleep(0.005)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (proc(5)); None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
