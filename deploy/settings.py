"""Everything a server is told: the engine's options and the router's, from flat names."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.config import EngineConfig, declared_options, with_gpu_defaults
from engine.errors import ConfigError
from engine.vllm_options import translated
from router.config import RouterConfig

CPU_STEP_TOKENS = 320
# Of a server's options those that may change while it runs.
SIZES = ("num_replicas", "min_replicas", "max_replicas")
SCALABLE = (*SIZES, "tensor_parallel_size", "pipeline_parallel_size", "revision")
STOP_BUFFER = 10.0  # seconds on top of --shutdown-timeout until Serve kills a replica


@dataclass(frozen=True)
class Settings:
    """What ``manta serve`` and a Serve config file say. ``options`` are those that were given, with
    manta's names."""

    engine: EngineConfig
    router: RouterConfig
    options: Mapping[str, Any]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Settings":
        """Settings from options with flat names.

        Raises ConfigError, naming the option and what is allowed.
        """
        engine = {f.name for _, f in declared_options()}
        router = {f.name for f in dataclasses.fields(RouterConfig)}
        options = translated(options, engine | router)
        return cls(
            EngineConfig.from_options(**{k: v for k, v in options.items() if k in engine}),
            RouterConfig.from_options(**{k: v for k, v in options.items() if k in router}),
            options,
        )


def with_server_defaults(options: Mapping[str, Any], num_gpus: float) -> dict[str, Any]:
    """A server's options, with what is not given as suits a server where a CPU computes.

    A CPU reads about a thousand tokens of prompts a second, however many at once: with large steps
    the first of many prompts waits for the last. And a server has time before its first request
    to take the memory of its KV blocks. GPUs have defaults of their own.
    """
    if num_gpus > 0 and options.get("device") != "cpu":
        return with_gpu_defaults(options)
    # Several that start at once on one machine do not see what the others are about to take.
    alone = options.get("num_replicas", 1) == 1 and not options.get("max_replicas")
    defaults: dict[str, Any] = {"prefault_kv_cache": alone}
    if options.get("enable_chunked_prefill") is not False:
        budget = max(CPU_STEP_TOKENS, options.get("max_num_seqs", 0))
        defaults["max_num_batched_tokens"] = budget
    return defaults | dict(options)


def server_options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(group, field) of every option of a server."""
    for f in dataclasses.fields(RouterConfig):
        yield "server", f
    for group, f in declared_options():
        yield f"engine: {group}", f


def read_config(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file: a map with their names, with dashes or underscores.

    Raises ConfigError if it cannot be read or is no such map. Its names are checked later.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {path} must be a map of options")
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in options:
            raise ConfigError(f"--config: {path} has {name} twice")
        options[name] = value
    return options
