"""Where servers start: users, machines and clusters that lack something. Each start works, or ends
with one line that names the cause; what it leaves behind is nothing."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.ports import free_ports
from tests.support.served import ROOT, Served, certificate, gone, pids, serve
from tests.support.users import poor
from tests.support.waiting import PATIENCE, until

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


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


class Request:
    """Long completions that a thread waits for: their events if it is a stream, and the status.

    They are more than a machine computes while a test sleeps.
    """

    def __init__(self, server: Served, stream: bool) -> None:
        self.lines: list[str] = []
        self.status = 0
        self._url = f"{server.url}/v1/completions"
        self._body = dict(prompt="Hello", ignore_eos=True, stream=stream, max_tokens=2000, n=8)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body) as answer:
            self.status = answer.status_code
            self.lines += (line for line in answer.iter_lines() if line)

    def join(self) -> list[str]:
        """What came, once all came."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.lines


def process_of(session: str, words: str) -> int:
    """That of the only one."""
    (found,) = pids(session, words)
    return found


def healthy(server: Served) -> bool:
    try:
        return httpx.get(f"{server.url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder with a path of more than 90 characters."""
    folder = tmp_path_factory.mktemp("starts") / ("t" * 90)
    folder.mkdir()
    return folder


def test_a_program_with_several_workers_starts_there_too_and_leaves_nothing(
    temporary: Path,
) -> None:
    program = (
        "from manta import LLM, SamplingParams\n"
        "llm = LLM(tensor_parallel_size=2, num_gpu_blocks_override=140, swap_space=0.1)\n"
        "(output,) = llm.generate('The capital of France is', SamplingParams(temperature=0))\n"
        "print(output.outputs[0].text)\n"
    )
    done = subprocess.run(
        [*poor(), sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and done.stdout.startswith(" Paris."), done.stderr
    assert [path.name for path in temporary.iterdir()] == ["manta-cache-54321"]


@pytest.fixture(scope="module")
def server(temporary: Path) -> Iterator[Served]:
    """For a user who is none, without a home, where there is little of anything."""
    with serve(
        *SMALL, "--host", "::", "--shutdown-timeout", "1",
        before=poor(), TMPDIR=str(temporary), MANTA_TEST=f"starts-{os.getpid()}", HOME="/nowhere",
    ) as server:  # fmt: skip
        yield server


def test_a_user_without_a_home_serves_where_there_is_little(
    server: Served, temporary: Path
) -> None:
    until(lambda: f"Ready at http://localhost:{server.port} in" in server.log.read_text())
    for host in ("127.0.0.1", "[::1]"):
        answer = httpx.post(
            f"http://{host}:{server.port}/v1/completions",
            json={"prompt": "Hello"},
            timeout=PATIENCE,
        )
        assert answer.status_code == 200, answer.text
    files = [path for path in temporary.iterdir() if "cache" not in path.name]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o700]
    assert (files[0] / "auth_token").stat().st_mode & 0o777 == 0o600
    kernels = list(temporary.glob("manta-cache-54321/kernels/*"))
    assert [path.suffix for path in kernels] == [".so"]


def test_a_request_id_that_is_no_text_is_replaced(server: Served) -> None:
    for value in (b"a\x80b", b"\xc3\xa9"):
        answer = httpx.get(
            f"{server.url}/v1/models", headers={b"X-Request-Id": value}, timeout=PATIENCE
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"].isascii()


def test_haproxy_that_is_killed_comes_back_and_follows_what_changes(server: Served) -> None:
    session = f"starts-{os.getpid()}"
    for _ in range(2):
        os.kill(killed := process_of(session, "haproxy -db"), signal.SIGKILL)
        until(lambda: healthy(server))
        assert process_of(session, "haproxy -db") != killed
    # An ingress replica that is replaced has another port, of which the new one must hear.
    router = "ServeReplica:manta:Router"
    os.kill(killed := process_of(session, router), signal.SIGKILL)
    until(lambda: healthy(server) and {*pids(session, router)} - {killed})


def test_what_a_shutdown_cuts_off_ends_with_an_error(server: Served, temporary: Path) -> None:
    """The last of the module: SIGHUP stops the server, as SIGTERM would."""
    requests = [Request(server, stream) for stream in (True, False)]
    until(lambda: len(requests[0].lines) > 20)
    server.process.send_signal(signal.SIGHUP)
    *_, error, end = requests[0].join()
    cut = "the server was shut down before the request had finished"
    assert f'"message":"{cut}"' in error and end == "data: [DONE]"
    (error,) = requests[1].join()
    assert requests[1].status == 503 and f'"message":"{cut}"' in error
    assert server.process.wait(PATIENCE) == 0
    gone(f"starts-{os.getpid()}")
    assert [path.name for path in temporary.iterdir()] == ["manta-cache-54321"]
    said = server.log.read_text()
    assert "failed" not in said and "Traceback" not in said, said


@pytest.mark.parametrize(("name", "words"), [("raylet", "raylet/raylet"), ("gcs_server", "gcs_s")])
def test_a_ray_that_ends_takes_the_server_along(name: str, words: str, tmp_path: Path) -> None:
    session = f"{name}-{os.getpid()}"
    options = [*SMALL, "--host", "127.0.0.1", "--shutdown-timeout", "2"]
    with serve(*options, status=1, TMPDIR=str(tmp_path), MANTA_TEST=session) as server:
        until(lambda: "Ready at" in server.log.read_text())
        request = Request(server, stream=True)
        until(lambda: len(request.lines) > 20)
        os.kill(process_of(session, words), signal.SIGKILL)
        *_, error, end = request.join()
        assert "before the request had finished" in error and end == "data: [DONE]"
        assert server.process.wait(PATIENCE) == 1
        assert f"Ray's {name} has ended" in server.log.read_text()
    gone(session)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_killed_leaves_no_key_and_the_next_start_removes_the_rest(
    tmp_path: Path,
) -> None:
    certificate(tmp_path)
    (folder := tmp_path / "t").mkdir()
    session = f"killed-{os.getpid()}"
    (port,) = free_ports(1)
    files = ["--ssl-keyfile", f"{tmp_path}/key.pem", "--ssl-certfile", f"{tmp_path}/cert.pem"]
    command = [*SERVE, *SMALL, "--host", "127.0.0.1", "--port", str(port), *files]
    environment = os.environ | {"TMPDIR": str(folder), "MANTA_TEST": session}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    until(lambda: "Ready at https://127.0.0.1" in (tmp_path / "log").read_text())
    process.kill()
    process.wait()
    gone(session)
    (left,) = [path for path in folder.iterdir() if path.name.startswith("manta-")]
    kept = [path for path in left.rglob("*") if path.is_file()]
    assert kept and not any(b"PRIVATE KEY" in path.read_bytes() for path in kept)
    # Starts that a signal ends early: the first once it has removed that; nothing is left of any.
    for seconds in (0.0, 2.0, 6.0):
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        while not _catches(process.pid, signal.SIGTERM) or os.path.lexists(left):
            time.sleep(0.005)
        time.sleep(seconds)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        gone(session)
        assert list(folder.iterdir()) == []


def test_a_machine_with_ipv6_only_serves_and_one_without_a_loopback_is_told(
    tmp_path: Path,
) -> None:
    network = "ip link set lo up && ip address add fd00::1/128 dev lo"
    few = "&& ip address del 127.0.0.1/8 dev lo"
    error = fails(before=tuple(poor(f"{network} {few}")))
    assert error.startswith("Ray needs 127.0.0.1, which this machine has not (")
    script = (
        f'"$@" --host :: --port 8000 > {tmp_path}/log 2>&1 & '
        f"until grep -q 'Ready at' {tmp_path}/log; do kill -0 $! || exit 1; sleep 0.1; done; "
        "curl -sf http://[fd00::1]:8000/health && curl -sf http://[::1]:8000/v1/models; "
        "kill $!; wait $!"
    )
    command = [*poor(network), "sh", "-c", script, "sh", *SERVE, *SMALL]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0 and '"id":"manta-demo"' in done.stdout, (done.stderr, said)
    assert "Ready at http://localhost:8000 in" in said


def test_a_start_that_takes_too_long_ends_and_keeps_rays_logs(tmp_path: Path) -> None:
    session = f"late-{os.getpid()}"
    done = subprocess.run(
        [*SERVE, *SMALL, "--host", "127.0.0.1", "--startup-timeout", "1"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "MANTA_TEST": session},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2, done.stderr
    *_, kept, error = done.stderr.splitlines()
    assert error == "manta: error: no engine is ready within startup_timeout (1 s)"
    gone(session)
    (folder,) = tmp_path.iterdir()
    assert "The logs of Ray stay in " in kept
    assert (folder / "ray/session_latest/logs/raylet.out").is_file()
