"""``manta serve``: one server for the module, real processes, HTTP through HAProxy."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from ray._common.utils import reset_ray_address

from deploy.ports import free_ports
from tests.support.served import certificate, gone, left_of, pids, wait_ready
from tests.support.waiting import PATIENCE, until

(PORT,) = free_ports(1)  # others may test here too
URL = f"http://127.0.0.1:{PORT}"
OPTIONS = [
    "--num-ingress-replicas", "2",
    "--host", "127.0.0.1", "--port", str(PORT), "--shutdown-timeout", "300", "--max-num-seqs", "4",
    "--num-gpu-blocks-override", "140", "--swap-space", "0.2", "--preemption-mode", "swap",
    "--max-model-len", "2048",
]  # fmt: skip


def start_server(*options, log):
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "serve", *options],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's process and its log; its last test stops it."""
    log = (tmp_path_factory.mktemp("serve") / "log").open("w")
    os.environ["MANTA_TEST"] = session = f"serve-{os.getpid()}"
    process = start_server(*OPTIONS, log=log)
    try:
        wait_ready(process, Path(log.name), f"{URL}/health")
        until(lambda: f"Ready at {URL} in " in Path(log.name).read_text())
        yield process, log, session
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE)


def body(**fields):
    return {"model": "manta-demo", "prompt": "Hello", "temperature": 0, **fields}


def metric(name, labels=""):
    """The sum of a metric's series whose labels match."""
    text = httpx.get(f"{URL}/metrics").text
    lines = re.findall(rf"^manta:{name}(?:{{([^}}]*)}})? (\S+)$", text, re.M)
    assert lines, f"no {name} in {text[:2000]}"
    return sum(float(value) for found, value in lines if labels in found)


def idle():
    return not (
        metric("num_requests_running") or metric("num_requests_waiting")
        or metric("kv_blocks_used") or metric("cpu_kv_blocks_used")
    )  # fmt: skip


class Reading:
    """A streamed request that a thread reads to its end."""

    def __init__(self, url=URL, client=None, **fields):
        self._url = url
        self._client = client or {}
        self.text = ""
        self.done = False
        self.error = None
        self._fields = body(stream=True, ignore_eos=True, **fields)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            with httpx.stream(
                "POST",
                f"{self._url}/v1/completions",
                json=self._fields,
                timeout=PATIENCE,
                **self._client,
            ) as r:
                assert r.status_code == 200, r.read()
                for line in r.iter_lines():
                    if line == "data: [DONE]":
                        self.done = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            self.error = event["error"]
                        else:
                            self.text += event["choices"][0]["text"]
        except Exception as error:
            self.error = self.error or error


def test_it_answers_through_haproxy(server):
    response = httpx.post(f"{URL}/v1/completions", json=body(max_tokens=8))
    answer = response.json()
    assert answer["usage"]["completion_tokens"] == 8
    (request_id,) = response.headers.get_list("x-request-id")  # Serve's own, as none was sent
    assert answer["id"] == f"cmpl-{request_id}"
    response = httpx.post(
        f"{URL}/v1/completions", json=body(max_tokens=1), headers={"X-Request-Id": "trace-7"}
    )
    assert response.headers.get_list("x-request-id") == ["trace-7"]
    assert response.json()["id"] == "cmpl-trace-7"
    reading = Reading(max_tokens=8)
    reading.thread.join()
    assert reading.done and reading.text == answer["choices"][0]["text"]
    assert httpx.get(f"{URL}/v1/models").json()["data"][0]["id"] == "manta-demo"


def test_a_client_of_http_1_0_gets_no_chunks(server):
    data = json.dumps(body(max_tokens=8, stream=True)).encode()
    head = (
        "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", PORT), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + data)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b" 200 OK" in head and b"chunked" not in head.lower()
    assert events.startswith(b"data: {") and events.endswith(b"data: [DONE]\n\n")


def send(receive_buffer=None, **fields):
    """A request on a socket of its own, of which nothing is read."""
    data = json.dumps(body(ignore_eos=True, **fields)).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", PORT))
    connection.sendall(head.encode())
    time.sleep(0.001)  # head and body come one by one, as httpx sends them
    connection.sendall(data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_blocks_in_any_state(server, stream):
    """Requests of which some run, some are swapped out, and some have never run."""
    with httpx.Client() as client:

        def load(name):
            return client.get(f"{URL}/load").json()["engines"][0][name]

        blocks = load("free_blocks")
        # Four prompts leave little of the blocks, so that soon one of them is swapped out.
        sent = [send(prompt=[7 + i] * 500, max_tokens=1500, stream=stream) for i in range(8)]
        until(lambda: metric("cpu_kv_blocks_used"))
        assert load("running") and load("waiting")
        for connection in sent:
            connection.close()
        seconds = until(lambda: load("free_blocks") == blocks)
        assert not load("running") and not load("waiting")
        until(idle)
    print(f"freed {seconds * 1e3:.0f} ms after the clients went")


def engine_pid(session):
    return pids(session, "ServeReplica:manta-engines-0:Engine")[0]


def answers(streams):
    """The texts of streams that run at the same time."""
    for reading in streams:
        reading.thread.join(PATIENCE)
        assert reading.done and reading.error is None, reading.error
    return [reading.text for reading in streams]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_is_replaced_and_its_requests_go_on(server, number):
    """There is no other: they wait for it, streams and whole answers."""
    process, log, session = server
    fields = [{"max_tokens": 600, "seed": i, "temperature": 1} for i in range(3)]
    expected = answers([Reading(**one) for one in fields])
    readings = [Reading(**one) for one in fields]
    whole = []
    thread = threading.Thread(
        target=lambda: whole.append(
            httpx.post(
                f"{URL}/v1/completions", json=body(ignore_eos=True, **fields[0]), timeout=PATIENCE
            ).json()
        )
    )
    thread.start()
    until(lambda: metric("num_requests_running") == 4)
    engine = engine_pid(session)
    moved = metric("requests_moved_total", 'cause="lost"')
    os.kill(engine, number)
    until(lambda: httpx.get(f"{URL}/health").status_code == 503)
    assert answers(readings) == expected
    thread.join(PATIENCE)
    (answer,) = whole
    assert answer["choices"][0]["text"] == expected[0]
    assert answer["usage"]["completion_tokens"] == 600
    assert metric("requests_moved_total", 'cause="lost"') == moved + 4
    assert metric("moved_tokens_total") > 0
    if number == signal.SIGSTOP:  # Serve's shutdown would wait for it
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)


def test_an_ingress_replica_that_is_killed_takes_along_only_streams_that_have_begun(server):
    """HAProxy asks another one for what has not begun; the others' connections break at once."""
    process, log, session = server
    readings = [Reading(max_tokens=1000, seed=i) for i in range(4)]
    until(lambda: all(reading.text for reading in readings))
    statuses = []
    client = httpx.Client(timeout=PATIENCE)  # one: to make eight takes longer than a stream
    threads = [
        threading.Thread(
            target=lambda: statuses.append(
                client.post(f"{URL}/v1/completions", json=body(max_tokens=8)).status_code
            )
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    until(lambda: metric("num_requests_waiting") > 3)
    os.kill(pids(session, "ServeReplica:manta:Router")[0], signal.SIGKILL)
    for reading in readings:
        reading.thread.join(PATIENCE)
        assert reading.done or isinstance(reading.error, httpx.RemoteProtocolError), reading.error
    for thread in threads:
        thread.join(PATIENCE)
    assert statuses == [200] * 8
    until(idle)


def test_a_port_that_is_taken_is_said_at_once(server):
    again = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "serve", *OPTIONS], capture_output=True, text=True
    )
    assert again.returncode == 2
    assert f"cannot listen on 127.0.0.1:{PORT}: Address already in use" in again.stderr


def test_a_signal_drains_and_nothing_is_left(server):
    """The last of the module: it stops the server."""
    process, log, session = server
    readings = [Reading(max_tokens=400, seed=i) for i in range(3)]
    until(lambda: metric("num_requests_running") == 3)
    # More megabytes than sockets hold: those of the prompt come with each of the eight choices.
    slow = send(prompt=[7] * 1700, max_tokens=100, n=8, temperature=1, logprobs=20,
                prompt_logprobs=20, receive_buffer=4096)  # fmt: skip
    until(lambda: metric("num_requests_running") == 4)
    process.terminate()
    refused = None
    deadline = time.monotonic() + PATIENCE
    while refused is None or refused.status_code == 200:
        assert time.monotonic() < deadline
        refused = httpx.post(f"{URL}/v1/completions", json=body(max_tokens=1))
    assert refused.status_code == 503 and refused.headers["retry-after"]
    for reading in readings:
        reading.thread.join(PATIENCE)
        assert reading.done, reading.error
    time.sleep(1.0)
    assert process.poll() is None  # one client has not read its answer yet
    with slow:
        answer = b"".join(iter(lambda: slow.recv(1 << 16), b""))
    choices = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [100] * 8
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [1700] * 8
    assert process.wait(PATIENCE) == 0
    gone(session)


def test_https_a_key_and_a_config_file_and_a_second_signal_that_ends_it_at_once(tmp_path):
    certificate(tmp_path)
    (tmp_path / "config.yaml").write_text(
        f"model: manta-demo\nhost: 127.0.0.1\nport: {PORT}\nssl-keyfile: {tmp_path}/key.pem\n"
        f"ssl_certfile: {tmp_path}/cert.pem\nserved-model-name: [demo, other]\n"
        "num-gpu-blocks-override: 140\nswap_space: 0.1\n"
    )
    os.environ["MANTA_TEST"] = session = f"second-{os.getpid()}"
    os.environ["MANTA_API_KEY"] = "sesame"
    url = f"https://127.0.0.1:{PORT}"
    trust = {"verify": ssl.create_default_context(cafile=tmp_path / "cert.pem")}
    client = trust | {"headers": {"Authorization": "Bearer sesame"}}
    with (tmp_path / "log").open("w") as log:
        try:
            process = start_server("--config", str(tmp_path / "config.yaml"), log=log)
        finally:
            del os.environ["MANTA_API_KEY"]
        wait_ready(process, Path(log.name), f"{url}/health", **trust)
        assert httpx.get(f"{url}/v1/models", **trust).status_code == 401
        models = httpx.get(f"{url}/v1/models", **client).json()["data"]
        assert [model["id"] for model in models] == ["demo", "other"]
        reading = Reading(url, client, model="demo", max_tokens=1900)
        until(lambda: reading.text)
        process.terminate()  # the server itself may not have seen yet that it is ready
        seen = len(reading.text)
        until(lambda: len(reading.text) > seen + 200)
        assert process.poll() is None
        process.terminate()
        start = time.monotonic()
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        print(f"ended {time.monotonic() - start:.2f} s after the second signal")
        gone(session)
        reading.thread.join()
        assert not reading.done
    until(_port_is_free)


def _port_is_free():
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def cluster(log, *options, **variables):
    """A Ray cluster of this machine, as an operator starts it; gives its ports."""
    names = ("--port", "--dashboard-port", "--metrics-export-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    own = {
        "RAY_AUTH_MODE": "disabled",  # else the ports want a token
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    process = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", "--block",
         "--node-ip-address=127.0.0.1", *(f"{name}={port}" for name, port in ports.items()),
         *options],
        env=os.environ | own | variables,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
        wait_ready(process, Path(log.name), f"{dashboard}/api/version")
        yield process, ports
    finally:
        process.terminate()
        process.wait(PATIENCE)
        reset_ray_address()  # it leaves it behind: programs would look for this Ray for minutes


def one_answer(**fields):
    """A request through HAProxy as manta configures it: Serve's own adds an x-request-id."""
    response = httpx.post(f"{URL}/v1/completions", json=body(max_tokens=3, **fields))
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 3
    (request_id,) = response.headers.get_list("x-request-id")
    assert response.json()["id"] == f"cmpl-{request_id}"


def test_it_joins_a_cluster_and_leaves_it_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_TEST", session := f"joined-{os.getpid()}")
    with (tmp_path / "log").open("w") as log, cluster(log) as (process_of_ray, ports):
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{ports['--port']}")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        process = start_server(*OPTIONS, log=log)
        try:
            wait_ready(process, Path(log.name), f"{URL}/health")
            one_answer()
        finally:
            process.terminate()
        assert process.wait(PATIENCE) == 0, Path(log.name).read_text()
        ours = re.compile(r"ray::(Serve|Proxy|HAProxy)|haproxy|deploy\.cli")
        deadline = time.monotonic() + PATIENCE
        while left := [found for found in left_of(session) if ours.search(found)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert process_of_ray.poll() is None
    gone(session)


MODELS = """\
models:
- {model: manta-demo, served-model-name: one, worker-cpus: 0.2, worker-resource: ours,
   tensor-parallel-size: 2, num-gpu-blocks-override: 140}
- {model: manta-demo, served-model-name: two, worker-cpus: 0.3, worker-resource: theirs,
   num-gpu-blocks-override: 140}
"""


def test_the_printed_config_is_one_that_serve_deploys(tmp_path, monkeypatch):
    """On a cluster that runs already; Ray's own agent there has the metrics of both sides."""
    monkeypatch.setenv("MANTA_TEST", session := f"config-{os.getpid()}")
    programs = Path(sys.executable).parent
    several = tmp_path / "models.yaml"
    several.write_text(MODELS)
    texts = [
        subprocess.run(
            [sys.executable, "-m", "deploy.cli", "serve", "--print-serve-config", *options],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for options in (OPTIONS[2:], [*OPTIONS[2:8], "--config", several])
    ]
    variables = dict(
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
        RAY_SERVE_HAPROXY_BINARY_PATH=str(programs / "manta-haproxy"),
        RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH="deploy.haproxy_guard.install",
    )
    assert all(name in text for name in variables for text in texts)
    with (
        (tmp_path / "log").open("w") as log,
        cluster(log, '--resources={"ours": 2, "theirs": 1}', **variables) as (process, ports),
    ):
        dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
        agent = f"http://127.0.0.1:{ports['--metrics-export-port']}/metrics"

        def deploy(text):
            (tmp_path / "serve.yaml").write_text(text)
            subprocess.run(
                [programs / "serve", "deploy", "serve.yaml", "--address", dashboard],
                cwd=tmp_path, env=os.environ | variables | {"RAY_AUTH_MODE": "disabled"},
                stdout=log, stderr=subprocess.STDOUT, check=True,
            )  # fmt: skip

        deploy(texts[0])
        wait_ready(process, Path(log.name), f"{URL}/health")
        one_answer()
        looked = subprocess.run(
            [sys.executable, "-m", "deploy.cli", "doctor"], capture_output=True, text=True,
            env=os.environ | variables
            | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{ports['--port']}"},
        )  # fmt: skip
        assert re.search(r"^ok       node \S+: \d+ CPU", looked.stdout, re.M), looked.stdout
        for line in (
            r"ray_manta_generation_tokens_total{.*} 3\.0",
            r"ray_manta_router_stage_seconds_count{.*stage=\"tokenize\".*} 1\.0",
        ):
            until(lambda line=line: re.search(line, httpx.get(agent).text))
        deploy(texts[1])
        until(lambda: served_names() == {"one", "two"} and len(processes()) == 3)
        for name in ("one", "two"):
            one_answer(model=name)
        before = processes()
        config = yaml.safe_load(texts[1])
        config["applications"].pop()
        config["applications"][0]["deployments"][0]["user_config"]["models"] = ["one"]
        deploy(yaml.safe_dump(config))
        until(lambda: served_names() == {"one"} and len(processes()) == 2)
        assert processes() < before  # neither the other's engine nor the ingress is another
        one_answer(model="one")
        assert httpx.post(f"{URL}/v1/completions", json=body(model="two")).status_code == 404
    gone(session)


def served_names():
    """Nothing while nobody answers."""
    answer = httpx.get(f"{URL}/v1/models")
    return {one["id"] for one in answer.json()["data"]} if answer.is_success else set()


def processes():
    """The ids of the engines and ingress replicas that answer."""
    return set(re.findall(r'(?:engine|ingress)="(\w+)"', httpx.get(f"{URL}/metrics").text))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--max-model-length", "5"], "unknown option --max-model-length; did you mean --max-mod"),
        (["--config", "no.yaml"], "--config: cannot read no.yaml: No such file"),
        (["--ssl-keyfile", "k"], "ssl_keyfile and ssl_certfile must be given together"),
        (["--ssl-keyfile", "k", "--ssl-certfile", "c"], "there is no file 'c'"),
        (["--ssl-keyfile", "k", "--ssl-certfile", "c", "--print-serve-config"], "are for `manta"),
        (["--num-replicas", "0"], "num_replicas must be an integer of at least 1, got 0"),
        (["./no-such-model"], "there is no folder './no-such-model'"),
        (["--port", "x"], "argument --port: must be an integer"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(options, error):
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "serve", *options], capture_output=True, text=True
    )
    assert done.returncode == 2 and error in done.stderr, done.stderr


def test_a_config_file_is_checked(tmp_path):
    file = tmp_path / "c.yaml"
    for text, error in (
        ("max-num-seq: 4", "unknown option max_num_seq; did you mean max_num_seqs?"),
        ("a: [", "is not YAML"),
        ("- a", "must be a map of options"),
        ("max-num-seqs: 4\nmax_num_seqs: 5", "has max_num_seqs twice"),
        ("port: http", "port must be an integer"),
    ):
        file.write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli", "serve", "--config", str(file)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and error in done.stderr, done.stderr
