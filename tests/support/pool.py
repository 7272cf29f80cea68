"""Processes that serve one replica's rank after another, so that a test of many models does not
import torch again for each. Everything in them is the real thing: ``workers.rank.serve``."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workers.rank import Call

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import sys, json
from workers.rank import Call, serve
for line in sys.stdin:
    rank, call = json.loads(line)
    try:
        serve(rank, "127.0.0.1", Call(**call), 1)
        print("done", flush=True)
    except SystemExit:
        print("failed", flush=True)
"""


class Pool:
    """A Launcher, to be used for one replica at a time."""

    host = "127.0.0.1"
    device = "cpu"

    def __init__(self, folders: list[Path] | None = None) -> None:
        self._folders = folders or []  # the working directories of the first processes
        self._processes: list[subprocess.Popen[str]] = []
        self.size = 0  # ranks of the next replica

    def start(self, call: Call) -> None:
        while len(self._processes) < self.size:
            number = len(self._processes)
            folder = self._folders[number] if number < len(self._folders) else ROOT
            self._processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        f"import sys; sys.path[:0] = [{str(ROOT)!r}]" + _PROGRAM,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=folder,
                )
            )
        for rank in range(self.size):
            pipe: Any = self._processes[rank].stdin
            pipe.write(json.dumps([rank, asdict(call)]) + "\n")
            pipe.flush()

    def ended(self, patience: float = 0.0) -> dict[int, str]:
        codes = enumerate(process.poll() for process in self._processes)
        return {rank: f"exit code {code}" for rank, code in codes if code is not None}

    def kill(self, ranks: Sequence[int], hard: bool) -> None:
        for rank in ranks:
            self._processes[rank].kill()

    def release(self) -> None:
        """They are to serve the next replica, if all ended as they should."""
        serving = self._processes[: self.size]
        if any(process.stdout and process.stdout.readline() != "done\n" for process in serving):
            self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes = []
