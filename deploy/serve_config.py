"""The configuration for ``serve deploy`` that says what ``manta serve`` with these options does."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from deploy.settings import Settings, of_server, without_secrets
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
MOST_OF_A_NAME = 40  # characters that a label may have of a model's name


def serve_config(models: Sequence[Settings]) -> str:
    """YAML. Raises ConfigError for options that only ``manta serve`` can honour."""
    if models[0].router.max_connections_per_client is not None:
        raise ConfigError(
            "max_connections_per_client is for `manta serve`; for `serve deploy` set"
            " MANTA_CLIENT_CONNECTIONS in the environment of the cluster's nodes"
        )
    most = [settings.router.replica_bounds[1] for settings in models]
    made = applications(models, [sum(most) - own for own in most])
    return ENVIRONMENT + str(yaml.safe_dump(made, sort_keys=False))


def applications(models: Sequence[Settings], beside: Sequence[int]) -> dict[str, Any]:
    """What Ray Serve is to run. Several models are an application each, so that one can come,
    change or leave without the others.

    beside: for each model how many engines of others share its machines. Raises ConfigError for a
    certificate, which Serve cannot have.
    """
    router = models[0].router
    if router.ssl_certfile is not None:
        raise ConfigError(
            "ssl_certfile and ssl_keyfile are for `manta serve`; before an application of"
            " `serve deploy` put a proxy that has the certificate"
        )
    if len(models) == 1:
        made = [_application("manta", "build", models[0].options)]
    else:
        ingress = _application("manta", "build_ingress", of_server(models[0].options))
        names = [name for settings in models for name in settings.names]
        # What may change without a new replica: models come and go.
        ingress["deployments"] = [{"name": "Router", "user_config": {"models": names}}]
        made = [ingress]
        for label, settings, others in zip(labels(models), models, beside, strict=True):
            given = without_secrets(settings.options)
            given |= {"beside": others} if others else {}
            made.append(_application(f"manta-engines-{label}", "build_engines", given))
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": router.host, "port": router.port},
        "applications": made,
    }


def _application(name: str, builder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": None if builder == "build_engines" else "/",
        "import_path": f"deploy.serve:{builder}",
        "args": {
            option: list(value) if isinstance(value, tuple) else value
            for option, value in options.items()
            if option not in ("host", "port")
        },
    }


def labels(models: Iterable[Settings]) -> list[str]:
    """For each model a name of its own that may be part of an application's, or of a label of
    Kubernetes': small letters, digits and dashes."""
    found: list[str] = []
    for settings in models:
        plain = re.sub(r"[^a-z0-9]+", "-", settings.names[0].lower())
        label = first = plain[:MOST_OF_A_NAME].strip("-") or "model"
        for number in itertools.count(2):
            if label not in found:
                break
            label = f"{first}-{number}"
        found.append(label)
    return found
