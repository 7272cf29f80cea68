"""What Ray Serve's processes are to find in their environment."""

import os

from deploy import haproxy
from deploy.ports import free_ports
from engine.folders import RunFolder
from engine.log import FORMAT_VARIABLE
from router.config import RouterConfig

LONGEST_STREAM = 24 * 3600  # seconds that an HAProxy which was replaced goes on with its streams
CALLBACK = "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"
GUARD = "deploy.haproxy_guard.install"
OWN_DRAIN = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"


def everywhere(router: RouterConfig) -> dict[str, str]:
    """Variables for the processes on every node."""
    variables = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(haproxy.CLIENT_TIMEOUT),
        "RAY_SERVE_HAPROXY_MAXCONN": str(haproxy.MOST_CONNECTIONS),
        # Where an ingress replica ends before it has answered, another is asked: a request changes
        # nothing, so it may be sent twice.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # Serve's controller looks around ten times a second: 3 % of a core, for nothing.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        # An HAProxy that is not there after 5 s would be killed and started again: on a busy
        # machine its process alone takes longer.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(router.startup_timeout),
        # Statistics of every event that its processes handle: an eighth of what they take.
        "RAY_event_stats": "0",
        # Else a replica whose host vanished is sent requests for 5 s more.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
        # ``deploy.server`` drains better.
        OWN_DRAIN: "0",
        haproxy.HOST: router.host,
        FORMAT_VARIABLE: router.log_format,
    }
    if router.max_connections_per_client is not None:
        variables[haproxy.CLIENT_CONNECTIONS] = str(router.max_connections_per_client)
    if not os.environ.get(CALLBACK):  # an operator's own goes before
        variables[CALLBACK] = GUARD
    return variables


def on_this_machine(router: RouterConfig, files: RunFolder, tls_pem: str | None) -> dict[str, str]:
    """Variables for a Ray of the server's own: servers on one machine must not share these.

    tls_pem: the file with the certificate and its key.
    """
    folder = files.path
    metrics, stats, fallback = free_ports(3, besides=router.port)
    variables = {
        haproxy.RUN_BY_SERVE: str(haproxy.program(folder)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / haproxy.ADMIN_SOCKET),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
    }
    if tls_pem is not None:
        variables[haproxy.TLS_PEM] = tls_pem
    return variables
