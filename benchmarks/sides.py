"""Engines side by side: each in a process of its own, that sleeps while the others run.

A script that compares engines gives ``Side`` its own file and serves with ``serve`` when it is
called with ``--side NAME MODEL``: a JSON argument a line in, a JSON answer a line out.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


class Side:
    """An engine's process."""

    def __init__(self, script: str, python: str, name: str, model: str) -> None:
        self.name = name
        environment = dict(os.environ, VLLM_LOGGING_LEVEL="ERROR", TQDM_DISABLE="1")
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        self._process = subprocess.Popen(
            [python, script, "--side", name, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        while True:  # engines print other lines too
            line = self._process.stdout.readline()
            if not line:
                raise SystemExit(f"{self.name} ended")
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))

    def run(self, argument: Any, pause: float = 1.0) -> Any:
        """One run's answer, after ``pause`` seconds in which the threads of the one before stop
        spinning."""
        time.sleep(pause)
        assert self._process.stdin
        self._process.stdin.write(json.dumps(argument) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def serve(run: Callable[[Any], Any]) -> None:
    """Answer until standard input closes."""
    print("answer", json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print("answer", json.dumps(run(json.loads(line))), flush=True)


def make_prompts(seed: int, count: int, length: int) -> list[list[int]]:
    """Random prompts, the same for every engine."""
    draw = random.Random(seed)
    return [[draw.randint(10, 15000) for _ in range(length)] for _ in range(count)]
