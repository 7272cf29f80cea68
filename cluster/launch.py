"""What starts, watches and ends the processes of a replica's ranks; here as plain processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Protocol

from engine.children import child_environment
from engine.config import EngineConfig
from engine.errors import ConfigError
from workers.rank import Call


class Launcher(Protocol):
    """Starts one process for each rank. ``host`` is this machine's address, as they reach it;
    ``device`` what they compute on, cpu or cuda."""

    host: str
    device: str

    def start(self, call: Call) -> None:
        """Start every rank, calling ``call``. Raises ConfigError or EngineError, at once, if there
        is no room for them."""
        ...

    def ended(self, patience: float = 0.0) -> dict[int, str]:
        """Which ranks' processes have ended, and how, after at most ``patience`` seconds."""
        ...

    def kill(self, ranks: Sequence[int], hard: bool) -> None:
        """End processes, without waiting; ``hard`` also those that hear nothing any more."""
        ...

    def release(self) -> None:
        """Give back what the processes held, once they ended or were killed."""
        ...


class ProcessLauncher:
    """Ranks as processes of this machine."""

    def __init__(self, config: EngineConfig) -> None:
        import torch

        self.host = "127.0.0.1"
        self.device = config.device.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._parallel = config.parallel
        if self.device == "cuda":
            there = torch.cuda.device_count()
            room = there * int(1 / self._parallel.worker_gpus + 1e-9)
            if room < self._parallel.world_size:
                raise ConfigError(
                    f"{self._parallel.world_size} workers with worker_gpus="
                    f"{self._parallel.worker_gpus:g} do not fit on the {there} GPUs of this machine"
                )
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, call: Call) -> None:
        cpus = self._parallel.worker_cpus
        for rank in range(self._parallel.world_size):
            words = [str(rank), self.host, call.host, str(call.port), call.ring, call.token]
            words += [] if cpus is None else [str(cpus)]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "workers.rank", *words],
                    env=child_environment(**self._visible(rank)),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is the executor's business
                )
            )

    def _visible(self, rank: int) -> dict[str, str]:
        if self.device != "cuda":
            return {}
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = rank // int(1 / self._parallel.worker_gpus + 1e-9)
        return {"CUDA_VISIBLE_DEVICES": given.split(",")[index] if given else str(index)}

    def ended(self, patience: float = 0.0) -> dict[int, str]:
        ended = {}
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is not None:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                ended[rank] = how
        return ended

    def kill(self, ranks: Sequence[int], hard: bool) -> None:
        for rank in ranks:
            if rank < len(self._processes):
                self._processes[rank].kill()

    def release(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []
