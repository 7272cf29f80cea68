"""``manta serve`` in a process of its own, as users run it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from deploy.ports import free_ports
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


class Served:
    """A running server. ``url`` is its root; clients of OpenAI's API take ``url + "/v1"``."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def wait_until_ready(self) -> None:
        """Until /health says so; fails with the log if the server ends instead."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health", timeout=60).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready:\n{self.log.read_text()[-5000:]}")

    def stop(self) -> int:
        """SIGTERM, as an operator would; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def serve(*options: str, model: str = "manta-demo", **env: str) -> Iterator[Served]:
    """``manta serve MODEL`` with options, ready to answer; stopped at the end, with status 0."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "deploy.cli", "serve", model, "--port", str(port), *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | env, stdout=out, stderr=out
            )
        served = Served(process, port, log)
        try:
            served.wait_until_ready()
            yield served
        finally:
            status = served.stop()
        assert status == 0, log.read_text()[-5000:]
