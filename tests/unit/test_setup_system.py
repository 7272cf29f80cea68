"""``make test`` and ``make demo`` where part of the system is missing: it comes, or is named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("chromium", "curl", "node", "npm", "openssl", "prometheus", "promtool", "g++")
ALL = "chromium curl g++ nodejs npm openssl prometheus python3-venv"
# Says what it was asked for, and does it.
APT = """#!/bin/sh
echo "$@" >> calls
[ "$1" = install ] || exit 0
[ -e broken ] && exit 100
for name in chromium curl node npm openssl prometheus promtool g++; do cp empty bin/$name; done
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder whose ``bin`` is all that the script finds: a shell, apt-get, and a Python without
    ensurepip."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sh", "sort", "env", "id", "cp", "cat"):
        (folder / name).symlink_to(str(shutil.which(name)))
    programs = {"bin/apt-get": APT, "empty": "#!/bin/sh\n", "bin/python3": "#!/bin/sh\nexit 1\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def set_up(machine: Path, what: str, *before: str) -> tuple[int, list[str], str]:
    """(status, lines on standard error, what apt-get was asked for)"""
    environment = {"PATH": str(machine / "bin")}
    command = [*before, str(machine / "bin" / "bash"), str(ROOT / "tools/setup_system.sh"), what]
    run = subprocess.run(command, cwd=machine, env=environment, capture_output=True, text=True)
    calls = machine / "calls"
    return run.returncode, run.stderr.splitlines(), calls.read_text() if calls.exists() else ""


def user(name: int) -> list[str]:
    """Words before a command that run it as another user, to whom nobody's files are closed."""
    unshare = str(shutil.which("unshare"))
    return [unshare, "-U", f"--map-user={name}"]


def test_root_has_it_installed(machine: Path) -> None:
    root = [] if os.geteuid() == 0 else user(0)
    status, said, calls = set_up(machine, "test", *root)
    assert status == 0, said
    assert calls == f"update -qq\ninstall -y --no-install-recommends {ALL}\n"
    (machine / "calls").unlink()
    (machine / "bin/python3").unlink()
    (machine / "bin/python3").symlink_to(sys.executable)
    assert set_up(machine, "test", *root) == (0, [], "")  # all is there


def test_whoever_is_not_root_is_told_the_command_at_once(machine: Path) -> None:
    status, said, calls = set_up(machine, "test", *user(1234))
    command = f"sudo apt-get install -y --no-install-recommends {ALL}"
    assert (status, said, calls) == (1, [f"missing packages: run   {command}"], "")
    status, said, _ = set_up(machine, "demo", *user(1234))
    assert status == 1 and said[0].endswith("--no-install-recommends python3-venv")


def test_without_apt_get_the_packages_are_named(machine: Path) -> None:
    (machine / "bin/apt-get").unlink()
    status, said, _ = set_up(machine, "test")
    assert status == 1 and said == [
        f"missing: {ALL} (Debian's names): install them, and run this again"
    ]


def test_an_installation_that_fails_is_said(machine: Path) -> None:
    (machine / "broken").touch()
    root = [] if os.geteuid() == 0 else user(0)
    status, said, _ = set_up(machine, "test", *root)
    assert status == 1 and said[-1] == "that failed: see above, or run it by hand"


def test_make_does_it_before_anything_else() -> None:
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of the make that runs these tests
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    for target in ("test", "demo"):
        command = ["make", "-Bn", target]
        dry = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        first = dry.stdout.splitlines()[0]
        assert first.endswith(f"tools/setup_system.sh {target}"), dry.stdout
