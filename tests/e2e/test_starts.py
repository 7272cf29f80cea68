"""Where servers start: users, machines and clusters that lack something. Each start works, or ends
with one line that names the cause; what it leaves behind is nothing."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from deploy.ports import free_ports
from tests.support.served import ROOT
from tests.support.waiting import PATIENCE

SMALL = ["--num-gpu-blocks-override", "140", "--swap-space", "0.1", "--max-model-len", "2048"]
SERVE = [sys.executable, "-m", "deploy.cli", "serve"]


def fails(*options: str, before: tuple[str, ...] = (), **environment: str) -> str:
    """The line with which a server ends that cannot start."""
    done = subprocess.run(
        [*before, *SERVE, *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("manta: error: ")


def test_a_cluster_that_is_none_or_does_not_answer_is_named() -> None:
    for address in ("nonsense", "10.0.0.1:70000", "http://localhost:8265"):
        error = fails(RAY_ADDRESS=address)
        assert error.startswith("RAY_ADDRESS must be HOST:PORT of a Ray cluster")
        assert error.endswith(f"got {address!r}")
    (port,) = free_ports(1)
    error = fails(RAY_ADDRESS=f"127.0.0.1:{port}")
    assert error == f"RAY_ADDRESS=127.0.0.1:{port}: no Ray answers there: Connection refused"
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        named = f"RAY_ADDRESS=127.0.0.1:{deaf.getsockname()[1]}"
        error = fails(RAY_ADDRESS=named.partition("=")[2])
    assert error.startswith(f"{named}: no Ray answers there: nothing that speaks gRPC within 5 s")


def test_programs_are_told_of_such_a_cluster_too() -> None:
    program = (
        "import manta\n"
        "for start in (lambda: manta.connect('x'), lambda: manta.start_engine('x', 'manta-demo'),\n"
        "              lambda: manta.LLM(tensor_parallel_size=2)):\n"
        "    try: start()\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": f"127.0.0.1:{port}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    refused = f"EngineError RAY_ADDRESS=127.0.0.1:{port}: no Ray answers there: Connection refused"
    assert done.stdout.splitlines() == [refused] * 3, done.stderr


def test_too_few_open_files_and_no_temporary_folder_are_named(tmp_path: Path) -> None:
    few = ("prlimit", "--nofile=256:256")
    assert fails(before=few).startswith("this process may have 256 files open, and Ray needs ")
    error = fails(RAY_TMPDIR=str(tmp_path / "none"))
    assert error == f"RAY_TMPDIR: {tmp_path}/none is no folder that can be written to"
