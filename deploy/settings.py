"""Everything a server is told: the engine's options and the router's, from flat names."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.options import from_words
from engine.config import EngineConfig, declared_options, with_gpu_defaults
from engine.errors import CheckpointError, ConfigError
from engine.vllm_options import translated
from router.config import RouterConfig

CPU_STEP_TOKENS = 320
# Of a server's options those that may change while it runs.
SIZES = ("num_replicas", "min_replicas", "max_replicas")
SCALABLE = (*SIZES, "tensor_parallel_size", "pipeline_parallel_size", "revision")
# Of the router's options those that each of several models has of its own, as all of the engine's.
OF_A_MODEL = frozenset({
    *SIZES, "upscale_delay", "downscale_delay", "served_model_name", "tool_call_parser",
    "reasoning_parser",
})  # fmt: skip
SECRET = ("api_key", "api_key_file")  # the ingress alone needs them
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

    @classmethod
    def of_models(cls, server: Mapping[str, Any], models: Any) -> list["Settings"]:
        """Those of each of the ``models`` of a server: a list of maps, as in a file.

        Raises ConfigError, naming the model and the option and what is allowed.
        """
        own = {f.name for _, f in model_options()}
        if not isinstance(models, list) or not models:
            raise ConfigError("models must be a list of maps of options, one for each model")
        for name in server:
            if name in own:
                raise ConfigError(f"{name} is a model's option: give it to each of models instead")
        found = []
        for i, options in enumerate(models):
            try:
                found.append(cls.of_model(server, options))
            except ConfigError as error:
                raise ConfigError(f"models[{i}]: {error}") from None
        names = Counter(name for settings in found for name in settings.names)
        for name, count in names.items():
            if count > 1:
                raise ConfigError(f"models: {count} are called {name!r}; see served_model_name")
        return found

    @classmethod
    def of_model(cls, server: Mapping[str, Any], options: Any) -> "Settings":
        """Those of one model of a server, with the server's. Raises ConfigError."""
        if not isinstance(options, dict):
            raise ConfigError("a model must be a map of options")
        return cls.from_options({**server, **model_given(options)}).completed()

    @property
    def names(self) -> tuple[str, ...]:
        """Those that requests may give for the model."""
        return self.router.served_model_name or (self.engine.model.model,)

    def completed(self) -> "Settings":
        """The same with the model's names, and with paths that hold wherever Ray's processes run.

        Raises CheckpointError if the model is a folder that is not there.
        """
        model = self.engine.model.model
        if model.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(model)):
            raise CheckpointError(f"there is no folder {model!r}")
        options = {**self.options, "model": model, "served_model_name": self.names}
        for name in ("model", "tokenizer", "chat_template", "api_key_file"):
            if isinstance(options.get(name), str) and os.path.exists(options[name]):
                options[name] = os.path.abspath(options[name])
        return Settings.from_options(options)


def of_server(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's and its server's options that are the server's."""
    own = {f.name for _, f in model_options()}
    return {name: value for name, value in options.items() if name not in own}


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that engines may be told."""
    return {name: value for name, value in options.items() if name not in SECRET}


def model_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """One model's options under manta's names. Raises ConfigError."""
    names = {f.name for _, f in model_options()}
    for name in options:
        if name not in names and name in {f.name for _, f in server_options()}:
            raise ConfigError(f"{name} is the server's option, not a model's")
    given = translated(from_words(options, model_options()), names)
    if not given.get("model"):
        raise ConfigError("model is missing: a checkpoint's folder, or a hub id")
    return given


def with_server_defaults(
    options: Mapping[str, Any], num_gpus: float, beside: int = 0
) -> dict[str, Any]:
    """A server's options, with what is not given as suits a server where a CPU computes.

    A CPU reads about a thousand tokens of prompts a second, however many at once: with large steps
    the first of many prompts waits for the last. And a server has time before its first request
    to take the memory of its KV blocks. GPUs have defaults of their own. ``beside``: engines that
    other models have on this server.
    """
    if num_gpus > 0 and options.get("device") != "cpu":
        return with_gpu_defaults(options)
    # Several that start at once on one machine do not see what the others are about to take.
    several = options.get("num_replicas", 1) > 1 or options.get("max_replicas")
    alone = not (several or beside)
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


def model_options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(group, field) of every option that each of several models has."""
    for group, f in server_options():
        if group != "server" or f.name in OF_A_MODEL:
            yield group, f


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
    options = _under_names(values, path)
    if isinstance(models := options.get("models"), list):
        options["models"] = [_under_names(m, path) if isinstance(m, dict) else m for m in models]
    return options


def _under_names(values: dict[Any, Any], path: str | Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in options:
            raise ConfigError(f"--config: {path} has {name} twice")
        options[name] = value
    return options
