"""An engine that others use: a replica, its loop and its server in one process."""

import os
import secrets
import threading
import time

import ray

from cluster.directory import Directory
from cluster.loop import EngineLoop
from cluster.transport import Server
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.log import get_logger

log = get_logger("engine")

LAST_WORDS = 0.5  # seconds in which a failed engine tells its clients, before its process ends


class EngineHost:
    """Builds a replica in this process and serves it until ``stop``.

    ``name`` is that of the application, in whose ``Directory`` it can be found. An engine that
    fails takes its process along, once its clients know why: whoever started it starts another.
    """

    def __init__(self, config: EngineConfig, name: str, threads: int | None = None) -> None:
        if threads is not None:  # Ray set one for each CPU that was asked for
            os.environ["OMP_NUM_THREADS"] = str(threads)
        from cluster.replica import start_engine  # imports torch, which reads the environment

        self.engine_id = secrets.token_hex(4)
        engine, info = start_engine(config, self.engine_id)
        self._hang_after = info.step_timeout
        self.loop = EngineLoop(engine, self._on_failure)
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        server = Server(self.loop, info, secrets.token_hex(16), host)
        self.address = server.address
        self.loop.start()
        self._directory = Directory(name)
        self._directory.add("engine", self.engine_id, self.address)

    def check_health(self) -> None:
        """Raises EngineError if the engine failed, or its step hangs."""
        if not self.loop.alive:
            raise EngineError(f"engine {self.engine_id} failed: {self.loop.failure}")
        seconds = self.loop.step_seconds
        if seconds > self._hang_after:
            raise EngineError(f"engine {self.engine_id}: a step hangs since {seconds:.0f} s")

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no further request, give those in flight time to end, and stop."""
        self._directory.remove("engine", self.engine_id, self.address)
        if drain_seconds > 0 and self.loop.alive:
            self.loop.drain()
            if not self.loop.wait_idle(drain_seconds):
                log.warning("Requests are still in flight after %g s; they end now", drain_seconds)
            time.sleep(0.05)  # the last tokens leave
        self.loop.stop()

    def _on_failure(self, cause: str) -> None:
        threading.Timer(LAST_WORDS, self._die).start()

    def _die(self) -> None:
        self._directory.remove("engine", self.engine_id, self.address)
        os._exit(1)
