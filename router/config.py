"""The options of the server, declared as the engine's are: see ``engine.config``."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ServedAs, group_of, option
from engine.errors import ConfigError
from engine.log import FORMATS
from engine.parsing.formats import AUTO, CALL_NAMES, NONE, THINKING_NAMES
from engine.vllm_options import translated


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
    api_key_file: str | None = option(
        None, "a file with such keys, one a line: unlike --api-key, `ps` does not show them"
    )
    dashboard: bool = option(True, "serve /dashboard: live plots and a playground, in a browser")
    ssl_keyfile: str | None = option(None, "the private key, to serve HTTPS")
    ssl_certfile: str | None = option(None, "the certificate, to serve HTTPS")
    access_log: bool = option(
        False, "log a line for each request: its id, status, tokens and times, never its text"
    )
    log_format: str = option("text", "lines for people, or JSON objects", choices=FORMATS)
    otlp_endpoint: str | None = option(
        None,
        "send traces to an OpenTelemetry collector at this URL, by OTLP over HTTP"
        " (http://localhost:4318); it needs manta-serve[otel]",
    )
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
    tool_call_parser: str = option(
        AUTO,
        "how the model writes tool calls; auto finds it by the chat template",
        choices=(AUTO, NONE, *CALL_NAMES),
    )
    reasoning_parser: str = option(
        AUTO,
        "how the model writes what it thinks; auto finds it by the chat template",
        choices=(AUTO, NONE, *THINKING_NAMES),
    )
    strict_tools: bool = option(
        False,
        "refuse tools that a provider would run itself (web search and the like) in /v1/responses"
        " and /v1/messages, which are passed over otherwise",
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
    startup_timeout: float = option(
        3600.0, "seconds after which a server that is not ready gives up", least=1
    )
    shutdown_timeout: float = option(
        60.0, "seconds that running requests are given to finish at a shutdown", least=0
    )
    num_replicas: int = option(1, "engine replicas", least=1)
    min_replicas: int | None = option(
        None, "with --max-replicas: engine replicas that are always there; 1 by default", least=1
    )
    max_replicas: int | None = option(
        None, "as many engine replicas as the load asks for, up to so many", least=1
    )
    upscale_delay: float = option(
        5.0, "seconds for which the load must ask for more engines until they start", least=0
    )
    downscale_delay: float = option(
        300.0, "seconds for which fewer engines must do until one leaves", least=0
    )
    num_ingress_replicas: int = option(
        1, "replicas of the HTTP side, each a process that makes tokens text", least=1
    )

    @property
    def served(self) -> ServedAs:
        """What clients see of the model."""
        return ServedAs(self.served_model_name, self.tool_call_parser, self.reasoning_parser)

    @property
    def replica_bounds(self) -> tuple[int, int]:
        """Of engine replicas the fewest and the most that there are."""
        if self.max_replicas is None:
            return self.num_replicas, self.num_replicas
        return self.min_replicas or 1, self.max_replicas

    def keys(self) -> tuple[str, ...]:
        """The API keys, also those of ``api_key_file``. Raises ConfigError if it has none."""
        if self.api_key_file is None:
            return self.api_key
        try:
            text = Path(self.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"api_key_file: cannot read {self.api_key_file}: {reason}") from None
        keys = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not keys:
            raise ConfigError(f"api_key_file: {self.api_key_file} has no key")
        return self.api_key + keys

    @classmethod
    def from_options(cls, **options: Any) -> "RouterConfig":
        """The config from flat options.

        Raises ConfigError, naming the option and what is allowed, for an unknown option, a wrong
        value or a contradiction.
        """
        config = group_of(cls, translated(options, [f.name for f in dataclasses.fields(cls)]))
        if (config.ssl_keyfile is None) != (config.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile must be given together")
        if config.max_replicas is None and config.min_replicas is not None:
            raise ConfigError("min_replicas needs max_replicas")
        if config.max_replicas is not None and config.num_replicas != 1:
            raise ConfigError("num_replicas says how many: max_replicas cannot be given beside it")
        least, most = config.replica_bounds
        if least > most:
            raise ConfigError(f"min_replicas={least} is more than max_replicas={most}")
        if config.root_path and not config.root_path.startswith("/"):
            raise ConfigError(f"root_path must begin with '/', got {config.root_path!r}")
        endpoint = config.otlp_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                "otlp_endpoint must be the URL of a collector that takes OTLP over HTTP, as"
                f" http://localhost:4318, got {endpoint!r}"
            )
        return config
