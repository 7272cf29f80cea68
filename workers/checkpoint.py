"""A checkpoint folder: where it is, and what its config.json and generation_config.json say.

The JSON files are read directly: importing a transformers config class costs two seconds, and the
few fields that matter are read, checked and given transformers' defaults by the model's traits.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import EMBEDDED_MODEL
from engine.errors import CheckpointError, ConfigError, shown
from engine.folders import settle_hub_cache

EMBEDDED_PATH = Path(__file__).resolve().parent.parent / "deploy" / "demo_model"
MOST_JSON_BYTES = 1 << 26  # of a file
MOST_INTEGER = 1 << 24  # of sizes and lengths: beyond what any model has
MOST_LAYERS = 4096
NUMBERS = (1e-30, 1e12)  # what numbers of a config may be
TEXT_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
CONDITIONAL = "ForConditionalGeneration"  # a text model beside others, of images say
SAMPLING_DEFAULTS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "do_sample",
)


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says about generation.

    ``defaults`` holds those of ``SAMPLING_DEFAULTS`` that generation_config.json sets, under
    transformers' names.
    """

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    defaults: dict[str, Any]


class Config:
    """config.json with checked access: an error names the field and what is allowed."""

    def __init__(self, values: dict[str, Any], source: str = "config.json") -> None:
        self.values = values
        self.source = source

    def __contains__(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(key) is not None

    def over(self, defaults: dict[str, Any]) -> "Config":
        """The same with ``defaults`` for what it leaves out; null is not left out."""
        return Config(defaults | self.values, self.source)

    def error(self, key: str, message: str) -> CheckpointError:
        """The error for field ``key``, naming the file and the value that it has."""
        return CheckpointError(f"{self.source}: {key}={shown(self.values.get(key))}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value, ``default`` where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, most: int = MOST_INTEGER) -> int:
        """A positive integer of at most ``most``."""
        value = self.get(key, default)
        allowed = f"must be a positive integer of at most {most}"
        if value is None:
            raise self.error(key, f"is missing; {allowed}")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.error(key, allowed)
        return value

    def whole(self, key: str, default: int) -> int:
        """An integer from 0 on."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_INTEGER:
            raise self.error(key, f"must be an integer from 0 to {MOST_INTEGER}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, within ``NUMBERS``."""
        value = self.get(key, default)
        least, most = NUMBERS
        allowed = f"must be a positive number, from {least:g} to {most:g}"
        if value is None:
            raise self.error(key, f"is missing; {allowed}")
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not least <= value <= most:
            raise self.error(key, allowed)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.get(key, default)
        if value not in allowed:
            raise self.error(key, f"is not supported; allowed: {', '.join(allowed)}")
        return str(value)


def resolve(model: str, revision: str | None = None, load_format: str = "auto") -> Path:
    """The folder of ``model``: a local folder as it is, else a Hugging Face hub id.

    A hub id is fetched into (or, with HF_HUB_OFFLINE or no network, taken from) the hub cache;
    safetensors are preferred to ``pytorch_model*.bin``, and "dummy" fetches no weights. Raises
    CheckpointError if there is neither a folder nor such a repository, or this user may not read
    the folder.
    """
    if model == EMBEDDED_MODEL:
        return EMBEDDED_PATH
    folder = Path(os.path.expanduser(model))
    try:
        if folder.is_dir():
            os.listdir(folder)
            return folder
        if folder.exists():
            raise CheckpointError(f"{model} is a file; give the folder that holds config.json")
    except OSError as error:
        raise CheckpointError(f"cannot read {model}: {error.strerror}") from error
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise CheckpointError(f"no folder {model}, and it is not a hub id (name or owner/name)")
    return _fetch(model, revision, load_format)


def _fetch(model: str, revision: str | None, load_format: str) -> Path:
    settle_hub_cache()
    from huggingface_hub import snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def download(patterns: list[str], ignored: str = "*/*") -> Path:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=[ignored, "consolidated*"],
            )
        )

    weights = {"auto": ["*.safetensors"], "safetensors": ["*.safetensors"]}.get(load_format, [])
    try:
        path = download(TEXT_FILES + weights)
        wants_pt = load_format == "auto" and not any(path.glob("*.safetensors"))
        if wants_pt or load_format == "pt":
            path = download(TEXT_FILES + ["pytorch_model*.bin"])
        if (path / "modules.json").is_file():  # of sentence-transformers: a folder for each module
            path = download(["[0-9]_*/config.json"], ignored="*/*/*")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"no folder {model}, and the hub or its cache has no such model: {reason}"
        ) from error
    return path


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``. Raises CheckpointError if it cannot be read or is none."""
    values = read_any_json(file)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return values


def read_any_json(file: Path) -> Any:
    """What a JSON file holds. Raises CheckpointError if it cannot be read."""
    try:
        size = file.stat().st_size
        if size > MOST_JSON_BYTES:
            raise ValueError(f"it has {size} bytes, and {MOST_JSON_BYTES} are allowed")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def load_config(path: Path) -> Config:
    """The checkpoint's config.json; of one for images and text the ``text_config`` in it, with the
    ``architectures`` of the whole. Raises CheckpointError if it is missing or no JSON object."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json")
    values = read_json(file)
    text, names = values.get("text_config"), values.get("architectures")
    names = names if isinstance(names, list) else []
    if isinstance(text, dict) and any(str(name).endswith(CONDITIONAL) for name in names):
        outer = {k: v for k, v in values.items() if k not in ("text_config", "vision_config")}
        # What the inner config leaves out, a token id say, is the outer one's; the head is outside.
        values = outer | {k: v for k, v in text.items() if v is not None}
        values |= {k: outer[k] for k in ("architectures", "tie_word_embeddings") if k in outer}
    return Config(values, str(file))


def load_generation_config(path: Path, config: Config) -> GenerationConfig:
    """generation_config.json, its token ids falling back to config.json's as in transformers."""
    file = path / "generation_config.json"
    values = read_json(file) if file.is_file() else {}

    def token(key: str) -> Any:
        return values.get(key) if values.get(key) is not None else config.get(key)

    eos = token("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i < 1 << 31 for i in ids):
        raise CheckpointError(
            f"{path}: eos_token_id={shown(eos)} must be an integer or a list of them, below 2^31"
        )
    return GenerationConfig(
        eos_token_ids=tuple(dict.fromkeys(ids)),
        bos_token_id=token("bos_token_id"),
        pad_token_id=token("pad_token_id"),
        defaults={k: values[k] for k in SAMPLING_DEFAULTS if values.get(k) is not None},
    )


def resolve_dtype(option: str, config: Config, device: torch.device) -> torch.dtype:
    """The type the model computes in, for the option ``dtype``.

    "auto" is the checkpoint's own type, but on a CPU bfloat16 in place of float16, which CPUs
    compute slowly if at all. Raises ConfigError for an unknown or unsupported ``option``.
    """
    if option != "auto" and option not in DTYPES:
        raise ConfigError(f"dtype={option!r}: allowed are auto, {', '.join(DTYPES)}")
    if option != "auto":
        dtype = DTYPES[option]
        if dtype == torch.float16 and device.type == "cpu":
            raise ConfigError(f"dtype={option!r} is not supported on a CPU; use bfloat16 or auto")
        return dtype
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = str(config.get(key, "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise config.error(key, f"is not supported; allowed: {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype
