"""``manta doctor`` on machines that lack something: each is named, with what to do."""

import os
import resource
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")


def doctor(
    capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit status, and by what was looked at: (level, what it says)."""
    status = main(["doctor", *words])
    *lines, last = capsys.readouterr().out.splitlines()
    found = {}
    for line in lines:
        level, _, rest = line.partition(" ")
        what, _, says = rest.strip().partition(": ")
        found[what] = (level.lower(), says)
    problems = sum(level == "problem" for level, _ in found.values())
    assert status == min(problems, 1)
    assert last == (f"{problems} to mend." if problems else "Nothing stands in the way.")
    return status, found


def test_a_good_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    status, found = doctor(capsys, "--port", str(port))
    assert status == 0
    assert {"open files", "/dev/shm", "temporary files", "cache", "models from the hub",
            f"port {port}", "loopback", "compiler", "Ray"} <= found.keys()  # fmt: skip
    assert any("GPU" in what for what in found)


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, found = doctor(capsys, "--host", "127.0.0.1", "--port", str(port))
    assert status == 1
    says = "127.0.0.1: somebody listens there already; --port names another"
    assert found[f"port {port}"] == ("problem", says)


@pytest.mark.parametrize(
    ("most", "level"), [(512, "problem"), (2048, "warning"), (resource.RLIM_INFINITY, "ok")]
)
def test_open_files(
    most: int, level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, most))
    _, found = doctor(capsys)
    assert found["open files"][0] == level
    assert ("ulimit -Hn 65536" in found["open files"][1]) == (level != "ok")


@pytest.mark.parametrize(
    ("megabytes", "level"), [(10, "problem"), (64, "warning"), (2000, "warning"), (20_000, "ok")]
)
def test_room(
    megabytes: int, level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = Usage(1 << 40, 0, megabytes << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    _, found = doctor(capsys)
    shm = "ok" if megabytes >= 1024 else level
    assert found["/dev/shm"][0] == shm
    disk = "problem" if megabytes < 1024 else level
    assert found["temporary files"][0] == found["models from the hub"][0] == disk


def test_no_place_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    _, found = doctor(capsys)
    level, says = found["temporary files"]
    assert level == "problem" and says.startswith("RAY_TMPDIR: ") and "written" in says
    assert found["compiler"][0] == "warning" and "g++" in found["compiler"][1]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1: no Ray answers there: Connection refused"),
        ("nonsense", "RAY_ADDRESS must be HOST:PORT of a Ray cluster"),
    ],
)
def test_a_cluster_that_is_not_there(
    address: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    status, found = doctor(capsys)
    assert status == 1 and found["Ray"][0] == "problem" and says in found["Ray"][1]


def test_gpus_that_pytorch_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver's program is a script here; PyTorch is the real one, and shall see no GPU."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "doctor", "--port", "8999"], cwd=ROOT, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if "GPUs" in line]
    assert done.returncode == 1 and line.startswith("PROBLEM  GPUs: 1 are there, and PyTorch ")


def test_a_port_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: Any = ["doctor", "--port", "70000"]
    assert main(arguments) == 2
    assert "--port must be from 1 to 65535, got 70000" in capsys.readouterr().err
