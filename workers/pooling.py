"""What a checkpoint says of pooling: its sentence-transformers files, and its architecture."""

from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError, shown
from engine.pooling import Method, Pooling
from workers.checkpoint import Config, load_config, read_any_json, read_json
from workers.models import Traits

MODULES = "modules.json"
_METHODS: dict[str, Method] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_FLAGS = {  # of a Pooling module before sentence-transformers 5.4, which has ``pooling_mode``
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {"Sigmoid": True, "Identity": False}


def served_config(path: Path, option: str) -> Config:
    """config.json as it is served with ``option`` pooling: an embedding model with an output layer
    of its own has none here, whether or not the files hold its weights."""
    config = load_config(path)
    names = config.get("architectures")
    embeds = option == "auto" and (path / MODULES).is_file()
    if embeds and isinstance(names, list) and config.get("tie_word_embeddings") is not True:
        headless = [str(name).replace("ForCausalLM", "Model") for name in names]
        return Config(config.values | {"architectures": headless}, config.source)
    return config


def read_pooling(path: Path, config: Config, traits: Traits, option: str) -> Pooling | None:
    """How the model pools with ``option`` pooling; None if it makes no vectors.

    Raises CheckpointError for modules that are not supported, ConfigError for an option that the
    model cannot follow.
    """
    if traits.labels:
        if option not in ("auto", "last"):
            raise ConfigError(f"pooling must be auto or last for a classifier, got {option!r}")
        return Pooling("last", scores=True, activates=_squashes(config))
    if option == "yes_no":
        if not traits.generates:
            raise ConfigError("pooling must not be yes_no: the model has no output layer")
        return Pooling("last", scores=True)
    if option == "none":
        if not traits.generates:
            raise ConfigError("pooling must not be none: the model generates no tokens")
        return None
    found = _from_modules(path)
    if option == "auto":
        return found or (None if traits.generates else Pooling("last"))
    return Pooling(_METHODS.get(option, "last"), activates=found is None or found.activates)


def longest_text(path: Path) -> int | None:
    """The most tokens that an embedding model was made for, if it says so.

    Raises CheckpointError.
    """
    file = path / "sentence_bert_config.json"
    if not file.is_file():
        return None
    config = Config(read_json(file), str(file))
    if config.boolean("do_lower_case", False):
        raise config.error("do_lower_case", "is not supported; the tokenizer can do it")
    return config.integer("max_seq_length") if "max_seq_length" in config else None


def _from_modules(path: Path) -> Pooling | None:
    file = path / MODULES
    if not file.is_file():
        return None
    kinds = {str(module.get("type")).rpartition(".")[2]: module for module in _modules(file)}
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise CheckpointError(
            f"{file}: module {shown(unknown[0])} is not supported; allowed: Transformer, Pooling,"
            " Normalize"
        )
    method: Method = "mean"  # sentence-transformers' default
    if "Pooling" in kinds:
        folder = str(kinds["Pooling"].get("path", ""))
        method = _method(path / folder / "config.json")
    return Pooling(method, activates="Normalize" in kinds)


def _modules(file: Path) -> list[dict[str, Any]]:
    modules = read_any_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{file} must hold a list of modules")
    return modules


def _method(file: Path) -> Method:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it says how the model pools")
    config = Config(read_json(file), str(file))
    names = [name for flag, name in _FLAGS.items() if config.get(flag) is True]
    mode = config.get("pooling_mode", names)
    modes = mode if isinstance(mode, list) else [mode]
    if len(modes) != 1 or modes[0] not in _METHODS:
        raise CheckpointError(
            f"{file}: pooling by {shown(modes)} is not supported; allowed is one of"
            f" {', '.join(_METHODS)}"
        )
    return _METHODS[modes[0]]


def _squashes(config: Config) -> bool:
    """Whether a classifier's scores are probabilities, as sentence-transformers has it."""
    own = config.get("sentence_transformers", {})
    name = own.get("activation_fn") if isinstance(own, dict) else None
    name = name or config.get("sbert_ce_default_activation_function") or "Sigmoid"
    activation = str(name).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise config.error(
            "sentence_transformers", f"activation_fn must be one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[activation]
