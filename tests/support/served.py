"""``manta serve`` in a process of its own, as users run it."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from deploy.ports import free_ports
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


def wait_ready(process: "subprocess.Popen[bytes]", log: Path, url: str, **client: Any) -> None:
    """Until ``url`` is answered with 200; fails with the log if the process ends instead.
    ``client`` are options of httpx's."""
    deadline = time.monotonic() + PATIENCE
    # To make a client takes longer than to ask.
    with httpx.Client(timeout=PATIENCE, **client) as asking:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if asking.get(url).status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(f"{url} is not ready:\n{log.read_text()[-5000:]}")


class Served:
    """A running server. ``url`` is its root; clients of OpenAI's API take ``url + "/v1"``."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def wait_until_ready(self) -> None:
        """Until /health says so; fails with the log if the server ends instead."""
        wait_ready(self.process, self.log, f"{self.url}/health")

    def stop(self) -> int:
        """SIGTERM, as an operator would; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def serve(
    *options: str,
    model: str | None = "manta-demo",
    before: Sequence[str] = (),
    status: int = 0,
    **env: str,
) -> Iterator[Served]:
    """``manta serve MODEL`` with options, ready to answer; stopped at the end, with ``status``.

    model: None where the options name it. before: words that come before the command.
    """
    (port,) = free_ports(1)
    named = [] if model is None else [model]
    command = [*before, sys.executable, "-m", "deploy.cli", "serve", *named, *options]
    command += ["--port", str(port)]
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
            ended = served.stop()
        assert ended == status, log.read_text()[-5000:]


def certificate(folder: Path) -> None:
    """Make ``key.pem`` and ``cert.pem``, for localhost."""
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)


def left_of(session: str) -> list[str]:
    """Processes of a session, and of those that its members started, by their environment."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{entry}/environ").read_bytes()
            if f"MANTA_TEST={session}\0".encode() in environment:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if words:  # no zombie
                    found.append(f"{entry} {words[:100]}")
    return found


def pids(session: str, name: str) -> list[int]:
    """The processes of a session that are called so."""
    return [int(entry.split()[0]) for entry in left_of(session) if name in entry]


def gone(session: str) -> None:
    """Wait until nothing of a session is left."""
    deadline = time.monotonic() + PATIENCE
    while left := left_of(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
