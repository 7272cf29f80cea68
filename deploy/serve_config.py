"""The configuration for ``serve deploy`` that says what ``manta serve`` with these options does."""

import yaml

from deploy.settings import Settings
from engine.errors import ConfigError

ENVIRONMENT = """\
# For `serve deploy`. Start the cluster's nodes (`ray start`) with these in their environment, so
# that no Python proxy stands between a client and its tokens, and HAProxy has manta's settings
# and is started again at once if it ends:
#   RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1
#   RAY_SERVE_HAPROXY_BINARY_PATH="$(command -v manta-haproxy)"
#   RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH=deploy.haproxy_guard.install
#   RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S=120 RAY_SERVE_HAPROXY_MAXCONN=32768
#   RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response"
"""


def serve_config(settings: Settings) -> str:
    """YAML. Raises ConfigError for options that only ``manta serve`` can honour."""
    router = settings.router
    if router.ssl_certfile is not None:
        raise ConfigError(
            "ssl_certfile and ssl_keyfile are for `manta serve`; before an application of"
            " `serve deploy` put a proxy that has the certificate"
        )
    if router.max_connections_per_client is not None:
        raise ConfigError(
            "max_connections_per_client is for `manta serve`; for `serve deploy` set"
            " MANTA_CLIENT_CONNECTIONS in the environment of the cluster's nodes"
        )
    args = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.options.items()
        if name not in ("host", "port")
    }
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": router.host, "port": router.port},
        "applications": [
            {
                "name": "manta",
                "route_prefix": "/",
                "import_path": "deploy.serve:build",
                "args": args,
            }
        ],
    }
    return ENVIRONMENT + str(yaml.safe_dump(config, sort_keys=False))
