"""The options of the server, declared as the engine's are: see ``engine.config``."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.config import group_of, option, refuse_unknown
from engine.errors import ConfigError


@dataclass(frozen=True)
class RouterConfig:
    """Everything the HTTP side is told."""

    host: str = option("0.0.0.0", "address to listen on")
    port: int = option(8000, "port to listen on", least=0, most=65535)
    served_model_name: tuple[str, ...] = option(
        (), "the names that requests may give for the model, the first in answers; repeatable"
    )
    api_key: tuple[str, ...] = option(
        (),
        "a key that clients must bring (Authorization: Bearer KEY) for all but /health and"
        " /metrics; repeatable; also MANTA_API_KEY",
    )
    ssl_keyfile: str | None = option(None, "the private key, to serve HTTPS")
    ssl_certfile: str | None = option(None, "the certificate, to serve HTTPS")
    root_path: str = option("", "the path under which a proxy in front serves this")
    allowed_origins: tuple[str, ...] = option(
        ("*",), "origins whose web pages may call this (CORS); repeatable"
    )
    allow_unknown_fields: bool = option(
        False, "let request fields that are not known through, without effect"
    )
    trust_request_chat_template: bool = option(
        False,
        "let requests bring chat templates of their own; a template can keep a processor busy",
    )
    max_body_bytes: int = option(16 << 20, "refuse larger request bodies", least=1)
    max_connections_per_client: int | None = option(
        None,
        "most connections from one address, or one /64 of IPv6; a quarter of all by default, of"
        " which there are 32768, or half of the files that HAProxy may open; give more where a"
        " proxy stands before this, as all its clients have its address",
        least=1,
    )
    request_timeout: float | None = option(
        None, "seconds after which a request is ended, with what it has", least=0.001
    )
    shutdown_timeout: float = option(
        60.0, "seconds that running requests are given to finish at a shutdown", least=0
    )
    num_replicas: int = option(1, "engine replicas", least=1)
    num_ingress_replicas: int = option(
        1, "replicas of the HTTP side, each a process that makes tokens text", least=1
    )

    @classmethod
    def from_options(cls, **options: Any) -> "RouterConfig":
        """The config from flat options.

        Raises ConfigError, naming the option and what is allowed, for an unknown option, a wrong
        value or a contradiction.
        """
        refuse_unknown(options, [f.name for f in dataclasses.fields(cls)])
        config = group_of(cls, options)
        if (config.ssl_keyfile is None) != (config.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile must be given together")
        if config.root_path and not config.root_path.startswith("/"):
            raise ConfigError(f"root_path must begin with '/', got {config.root_path!r}")
        return config
