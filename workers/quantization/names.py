"""Which linears a quantization_config means."""

import re
from collections.abc import Callable, Sequence

from workers.checkpoint import Config

# What no tool quantizes, and of which some checkpoints do not say so: what chooses experts, and
# embeddings, which as an output layer may be a linear here.
PLAIN = ("gate", "router", "shared_expert_gate", "embed_tokens")
HEADS = ("lm_head", "score")


def spellings(name: str) -> tuple[str, ...]:
    """What a checkpoint of images and text may call the linear ``name`` of its text model."""
    inner = name.removeprefix("model.")
    return name, f"model.language_model.{inner}", f"language_model.{name}"


def is_plain(name: str) -> bool:
    """Whether linear ``name`` is none that is ever quantized."""
    return name.rpartition(".")[2] in PLAIN


def read_names(config: Config, key: str) -> list[str]:
    """A list of names and patterns, empty where there is none. Raises CheckpointError."""
    names = config.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise config.error(key, "must be a list of names")
    return names


def skipped(config: Config, *keys: str) -> Callable[[str], bool]:
    """Whether a linear is one of those that the lists ``keys`` name, as transformers reads them:
    each is a regular expression for the name's beginning up to a dot, or the name's end.

    Raises CheckpointError.
    """
    rules: list[tuple[re.Pattern[str], str]] = []
    for key in keys:
        for name in read_names(config, key):
            try:
                rules.append((re.compile(rf"(?:{name})(?:(?<=\.)|(?=\.|$))"), name))
            except re.error as error:
                raise config.error(key, f"{name!r} is no regular expression: {error}") from error

    def skips(name: str) -> bool:
        return any(
            rule.match(spelling) or spelling.endswith(end)
            for spelling in spellings(name)
            for rule, end in rules
        )

    return skips


def matches(name: str, targets: Sequence[str]) -> int:
    """How closely one of compressed-tensors' ``targets`` means linear ``name``: 3, it is the name;
    2, a pattern (``re:``) of its beginning; 1, the class of all linears; 0, none does."""
    best = 0
    for target in targets:
        if target.startswith("re:"):
            pattern = target.removeprefix("re:")
            found = 2 if any(re.match(pattern, spelling) for spelling in spellings(name)) else 0
        else:
            found = 3 if target in spellings(name) else int(target == "Linear")
        best = max(best, found)
    return best
