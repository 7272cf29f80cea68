"""A process with an engine loop and its server on the simulated executor.

It prints its address, then answers lines on standard input: ``state`` with a JSON object of what
the engine holds, ``fail TEXT`` by failing the next step, ``hang`` by never ending it, ``step S`` by
steps of so many seconds.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

from cluster import transport
from cluster.loop import EngineLoop
from cluster.transport import Server
from engine.config import EngineConfig
from engine.engine import Engine
from tests.support.gated import INFO
from tests.support.simulator import SimulatedExecutor

STEP_SECONDS = 0.002
MAX_LEN = 4096


class Executor(SimulatedExecutor):
    """Steps that take a while, and fail or hang on demand."""

    error: str | None = None
    hang = False
    seconds = STEP_SECONDS
    poison = -1  # a token of which the process dies

    def run(self, plan: Any) -> Any:
        while self.hang:
            time.sleep(0.01)
        if self.error is not None:
            raise OSError(self.error)
        if any(self.poison in admit.tokens for admit in plan.admits):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return super().run(plan)


def main(
    step_timeout: float,
    num_blocks: int,
    num_cpu_blocks: int,
    max_num_seqs: int,
    most_unread: int,
    key_seconds: float,
    most_files: int,
    max_failovers: int,
    poison: int,
) -> None:
    """Serve until standard input closes."""
    transport.MOST_UNREAD, transport.KEY_SECONDS = most_unread, key_seconds
    config = EngineConfig.from_options(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        preemption_mode="swap",
        max_failovers=max_failovers,
    )
    executor = Executor(num_blocks, num_cpu_blocks, 4, max_num_seqs, MAX_LEN, None)
    executor.poison = poison
    engine = Engine(config, executor, executor.load(), executor.reserve(), MAX_LEN)
    loop = EngineLoop(engine)
    info = replace(
        INFO,
        engine_id="simulated",
        max_model_len=MAX_LEN,
        num_device_blocks=num_blocks,
        num_cpu_blocks=num_cpu_blocks,
        step_timeout=step_timeout,
    )
    server = Server(loop, info, "secret")
    loop.start()
    if most_files:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, hard))
    print(server.address, flush=True)
    kv, scheduler = engine.scheduler.kv, engine.scheduler
    for line in sys.stdin:
        command, _, text = line.strip().partition(" ")
        if command == "fail":
            executor.error = text
        elif command == "hang":
            executor.hang = True
        elif command == "step":
            executor.seconds = float(text)
        state = {
            "unfinished": engine.num_unfinished,
            "running": len(scheduler.running),
            "waiting": scheduler.num_waiting,
            "device": kv.device.num_held,
            "cpu": kv.cpu.num_held,
        }
        print(json.dumps(state), flush=True)


class EngineProcess:
    """The process, from a test's side."""

    def __init__(
        self,
        step_timeout: float = 60,
        num_blocks: int = 4096,
        num_cpu_blocks: int = 64,
        max_num_seqs: int = 64,
        most_unread: int = transport.MOST_UNREAD,
        key_seconds: float = transport.KEY_SECONDS,
        most_files: int = 0,
        max_failovers: int = 0,
        poison: int = -1,
    ) -> None:
        options = [step_timeout, num_blocks, num_cpu_blocks, max_num_seqs, most_unread]
        options += [key_seconds, most_files, max_failovers, poison]
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def ask(self, command: str = "state") -> dict[str, int]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer: dict[str, int] = json.loads(self.process.stdout.readline())
        return answer

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


if __name__ == "__main__":
    main(float(sys.argv[1]), *map(int, sys.argv[2:6]), float(sys.argv[6]), *map(int, sys.argv[7:]))
