"""Connections that ask for nothing but to be held, from loopback addresses of their own."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.listeners import listeners
from tests.support.served import Served, serve
from tests.support.waiting import PATIENCE

SHARE = 60  # connections of one address
HOSTILE = "127.0.0.66"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HALVES = {
    "no header": b"",
    "half a header line": b"POST /v1/comp",
    "half a header": POST,
    "half a body": POST + b'Content-Length: 100\r\n\r\n{"prompt"',
    "half a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * 17_000,
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """It has ten minutes to stop, of which it needs nothing: ``stop`` waits for a minute and a
    half, whatever half requests the tests have left."""
    options = ["--max-connections-per-client", str(SHARE), "--shutdown-timeout", "600"]
    with serve(*options) as served:
        left = [connect(served, half, "127.0.0.67") for half in HALVES.values()]
        yield served
    for connection in left:
        connection.close()


def connect(served: Served, data: bytes, source: str = HOSTILE) -> socket.socket:
    """A connection from a loopback address that has sent ``data``."""
    connection = socket.create_connection(("127.0.0.1", served.port), PATIENCE, (source, 0))
    connection.sendall(data)
    return connection


def answered(served: Served) -> bool:
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{served.url}/v1/completions", json=body).status_code == 200


def test_only_the_clients_port_is_open_to_other_machines(served: Served) -> None:
    found = list(listeners(served.process.pid))
    assert {"haproxy", "raylet", "ray::ServeReplica:manta-engines-0:Engine"} <= {
        one.process for one in found
    }
    open_to_all = {(one.process, one.port) for one in found if not one.on_loopback}
    assert {process for process, _ in open_to_all} == {"haproxy"}
    assert ("haproxy", served.port) in open_to_all


def test_a_request_that_never_comes_whole_is_ended_and_no_router_sees_it(served: Served) -> None:
    held = {name: connect(served, half) for name, half in HALVES.items()}
    time.sleep(1)
    for _ in range(5):
        assert answered(served)
    for name, connection in held.items():
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                data += part
        connection.close()
        if name == "no header":
            assert data == b""  # as a client that connects early may expect
            continue
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 "), (name, data)
        if "header" not in name:  # else the text is HAProxy's
            assert json.loads(body)["error"]["code"] == "request_timeout"


def test_one_address_fills_its_share_and_no_more(served: Served) -> None:
    held, refused = [], 0
    for _ in range(3 * SHARE):
        try:
            held.append(connect(served, b""))
        except ConnectionResetError:
            refused += 1
    time.sleep(0.5)
    for connection in held:
        connection.settimeout(0.01)
        try:
            refused += connection.recv(1) == b""
        except ConnectionResetError:
            refused += 1
        except TimeoutError:
            pass
    assert answered(served)
    for connection in held:
        connection.close()
    assert refused == 2 * SHARE
