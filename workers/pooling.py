"""What a checkpoint says of pooling: its sentence-transformers files, and its architecture."""

from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import CheckpointError, ConfigError, shown
from engine.pooling import Method, Pooling
from workers.checkpoint import Config, load_config, read_any_json, read_json
from workers.models import Traits
from workers.models.registry import ARCHITECTURES, EMBEDS, GENERATES

MODULES, CONFIG = "modules.json", "config.json"
_LOGITS = "LogitScore"  # of a reranker that generates yes and no, since sentence-transformers 5.4
_KINDS = ("Transformer", "Pooling", "Normalize", _LOGITS)
_METHODS: dict[str, Method] = {"last": "last", "lasttoken": "last", "mean": "mean", "cls": "cls"}
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
    modules = _modules(path) if option == "auto" else {}
    embeds = bool(modules) and _LOGITS not in modules
    if embeds and isinstance(names, list) and config.get("tie_word_embeddings") is not True:
        return Config(config.values | {"architectures": list(map(_headless, names))}, config.source)
    return config


def _headless(name: object) -> object:
    """The architecture without an output layer, if there is one such."""
    network = str(name).replace(GENERATES, EMBEDS)
    return network if network in ARCHITECTURES else name


def read_pooling(
    path: Path,
    config: Config,
    traits: Traits,
    option: str,
    ids_of: Callable[[Sequence[str]], list[int | None]],
) -> Pooling | None:
    """How the model pools with ``option`` pooling; None if it makes no vectors. ``ids_of`` gives
    the ids of tokens.

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
        tokens = tuple(id for id in ids_of(("yes", "no")) if id is not None)
        if len(tokens) < 2:
            raise ConfigError("pooling must not be yes_no: there are no tokens yes and no")
        return Pooling("last", scores=True, tokens=tokens)
    if option == "none":
        if not traits.generates:
            raise ConfigError("pooling must not be none: the model generates no tokens")
        return None
    found = _from_modules(path, config, traits.vocab_size)
    if option == "auto":
        return found or (None if traits.generates else Pooling("last"))
    activates = found is None or found.scores or found.activates
    return Pooling(_METHODS[option], activates=activates)


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


def _from_modules(path: Path, config: Config, vocab_size: int) -> Pooling | None:
    modules = _modules(path)
    if not modules:
        return None
    if unknown := [kind for kind in modules if kind not in _KINDS]:
        raise CheckpointError(
            f"{path / MODULES}: module {shown(unknown[0])} is not supported; allowed:"
            f" {', '.join(_KINDS)}"
        )
    if _LOGITS in modules:
        tokens = _score_tokens(modules[_LOGITS], vocab_size)
        return Pooling("last", scores=True, tokens=tokens, activates=_squashes(config))
    method: Method = "mean"  # sentence-transformers' default
    if "Pooling" in modules:
        method = _method(modules["Pooling"])
    return Pooling(method, activates="Normalize" in modules)


def _modules(path: Path) -> dict[str, Path]:
    """The config.json of each kind of module; nothing if there are none."""
    file = path / MODULES
    if not file.is_file():
        return {}
    modules = read_any_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{file} must hold a list of modules")
    return {
        str(module.get("type")).rpartition(".")[2]: path / str(module.get("path", "")) / CONFIG
        for module in modules
    }


def _score_tokens(file: Path, vocab_size: int) -> tuple[int, ...]:
    config = _module_config(file)
    tokens = [config.get("true_token_id"), config.get("false_token_id")]
    found = tuple(token for token in tokens if token is not None)
    if tokens[0] is None or any(
        type(token) is not int or not 0 <= token < vocab_size for token in found
    ):
        raise CheckpointError(f"{file}: true_token_id and false_token_id must be token ids")
    return found


def _module_config(file: Path) -> Config:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it says how the model pools")
    return Config(read_json(file), str(file))


def _method(file: Path) -> Method:
    config = _module_config(file)
    names = [name for flag, name in _FLAGS.items() if config.get(flag) is True]
    mode = config.get("pooling_mode", names)
    modes = mode if isinstance(mode, list) else [mode]
    if len(modes) != 1 or modes[0] not in _METHODS:
        raise CheckpointError(
            f"{file}: pooling by {shown(modes)} is not supported; allowed is one of lasttoken,"
            " mean, cls"
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
