"""Folders for caches and for sockets, whoever the user is and wherever temporary files go."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine import folders
from engine.errors import ConfigError
from engine.folders import RunFolder, cache_folder, cache_folders
from tests.support.users import nobody


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder with a path of 90 characters or more."""
    folder = tmp_path / ("t" * 90)
    folder.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_run_folder_has_room_for_sockets_wherever_it_is(temporary: Path) -> None:
    folder = RunFolder()
    assert folder.path.resolve().parent == temporary and folder.path.stat().st_mode & 0o777 == 0o700
    inner = folder.path / ("0" * 56)
    inner.mkdir()
    for name in ("admin.sock.4194304.tmp", "metrics.sock"):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(inner / name))
    assert os.listdir(temporary) == [folder.path.name]
    folder.remove()
    assert os.listdir(temporary) == [] and not os.path.lexists(folder.path)


def test_a_run_folder_is_where_ray_is_told_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = RunFolder()
    assert folder.path.resolve().parent == tmp_path
    folder.remove()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="RAY_TMPDIR: .*none is no folder that can be written"):
        RunFolder()


def test_without_a_short_path_the_error_says_what_to_do(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_SHORT", (str(temporary / "none"),))
    with pytest.raises(ConfigError, match=r"too long a path for sockets \(more than .* RAY_TMPDIR"):
        RunFolder()
    assert os.listdir(temporary) == []


def test_one_whose_making_a_signal_ends_leaves_nothing(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.folders.os.rename", signalled)
    with pytest.raises(KeyboardInterrupt):
        RunFolder()
    assert os.listdir(temporary) == []


def test_what_a_killed_process_left_is_removed_and_what_runs_is_not(temporary: Path) -> None:
    code = (
        "import tempfile, time; from engine.folders import RunFolder\n"
        f"tempfile.tempdir = {str(temporary)!r}\n"
        "print(RunFolder().path, flush=True); time.sleep(1000)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True) for _ in range(2)]
    killed, running = (Path(run.stdout.readline().strip()) for run in runs)  # type: ignore[union-attr]
    runs[0].kill()
    runs[0].wait()
    (temporary / "manta-else").mkdir()  # no lock: not one of these
    assert killed.exists() and running.exists()
    mine = RunFolder()
    assert not os.path.lexists(killed)
    expected = {running.name, mine.path.name, "manta-else"}
    assert set(os.listdir(temporary)) == expected
    mine.leave()
    runs[1].kill()
    runs[1].wait()
    RunFolder().remove()
    assert os.listdir(temporary) == ["manta-else"]


def test_caches_without_a_home_are_in_a_folder_that_only_this_user_may_touch(
    tmp_path: Path,
) -> None:
    code = "from engine.folders import cache_folders; print(*cache_folders('kernels'))"

    def found(*command: str, **environment: str) -> list[str]:
        environment = {**os.environ, "TMPDIR": str(tmp_path), **environment}
        run = subprocess.run(
            [*command, sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.split()

    assert found(*nobody()) == [f"{tmp_path}/manta-cache-54321/kernels"]
    home, own = found(HOME="/dev/null", XDG_CACHE_HOME="")
    assert home == "/dev/null/.cache/manta/kernels"
    assert own == f"{tmp_path}/manta-cache-{os.geteuid()}/kernels"
    (tmp_path / f"manta-cache-{os.geteuid()}").chmod(0o777)  # anybody could put a library there
    assert found(HOME="/dev/null", XDG_CACHE_HOME="") == [home]
    assert found(XDG_CACHE_HOME=str(tmp_path)) == [f"{tmp_path}/manta/kernels"]


def test_the_hub_keeps_its_files_where_a_user_without_a_home_may_write(tmp_path: Path) -> None:
    code = (
        "from engine.folders import settle_hub_cache; settle_hub_cache()\n"
        "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    )

    def found(*command: str, **environment: str) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
        run = subprocess.run(
            [*command, sys.executable, "-c", code],
            env={**kept, "TMPDIR": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()

    assert found(*nobody()) == f"{tmp_path}/manta-cache-54321/huggingface/hub"
    assert found(*nobody(), HF_HOME="/given") == "/given/hub"
    assert found(HOME=str(tmp_path)) == f"{tmp_path}/.cache/huggingface/hub"


def test_a_folder_that_another_user_made_is_none_of_the_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder("kernels") == tmp_path / "cache/manta/kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"manta-cache-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    assert list(cache_folders("kernels")) == [Path("/dev/null/x/manta/kernels")]
    with pytest.raises(OSError):
        cache_folder("kernels")
