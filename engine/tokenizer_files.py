"""The tokenizer of a checkpoint, as transformers' AutoTokenizer would resolve it, but sooner.

AutoTokenizer takes seconds to import and brings torch along. So a folder whose tokenizer.json says
all is read with ``tokenizers`` alone, and what transformers made of another is kept for the next
start, under a name that is a hash of all that it depends on.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from engine.errors import CheckpointError
from engine.folders import cache_folders, settle_hub_cache
from engine.token_bytes import ByteDecoder, byte_decoder

if TYPE_CHECKING:
    import tokenizers
    import transformers

SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

# Entries of tokenizer_config.json that change no token: with these alone tokenizer.json says all.
_PLAIN_ENTRIES = {
    *SPECIAL_TOKENS, "added_tokens_decoder", "additional_special_tokens", "backend",
    "chat_template", "clean_up_tokenization_spaces", "errors", "extra_special_tokens", "is_local",
    "local_files_only", "model_input_names", "model_max_length", "name_or_path", "padding_side",
    "processor_class", "response_template", "tokenizer_class", "truncation_side",
}  # fmt: skip
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# For other model types (qwen2) AutoTokenizer may prefer a class of its own to the one that the
# checkpoint names.
_PLAIN_MODEL_TYPES = (None, "llama", "mistral", "opt", "qwen3")


# Whose presence or version decides what transformers makes of a folder.
_DECIDING_PACKAGES = (
    "transformers", "tokenizers", "sentencepiece", "protobuf", "tiktoken", "mistral-common",
)  # fmt: skip


def panicked(error: BaseException) -> bool:
    """Whether ``tokenizers`` gave up in the middle, as it does where a regular expression takes
    too long; it raises what is no Exception then."""
    return type(error).__name__ == "PanicException"


class Backend(Protocol):
    """What this module needs of a tokenizer; ``tokenizers.Tokenizer`` has nearly all of it."""

    byte_decoder: ByteDecoder | None
    size: int
    added_ids: frozenset[int]
    added_tokens: dict[str, bool]  # whether they are special

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]: ...

    def encode_plain(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...


class FastBackend:
    """A tokenizer of the ``tokenizers`` library. Encodes several texts in parallel threads, unless
    TOKENIZERS_PARALLELISM=false."""

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self.byte_decoder = byte_decoder(backend)
        self.added_ids = frozenset(added)
        self.added_tokens = {token.content: token.special for token in added.values()}
        self.size = max(backend.get_vocab_size(), *(i + 1 for i in added), 0)
        self.id_to_token = backend.id_to_token
        self.token_to_id = backend.token_to_id

    def to_json(self) -> str | None:
        """All of it for another process, or None if JSON does not hold all."""
        return None if self._backend.encode_special_tokens else self._backend.to_str()

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_plain(self, text: str) -> list[int]:
        """The token ids of a text in which no added token is looked for."""
        backend = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        splits = [text]
        if backend.pre_tokenizer is not None:
            splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for split in splits for token in backend.model.tokenize(split)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)


class SlowBackend:
    """A tokenizer that transformers runs in Python."""

    byte_decoder: ByteDecoder | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.added_ids = frozenset(tokenizer.added_tokens_decoder)
        added = tokenizer.added_tokens_decoder.values()
        self.added_tokens = {token.content: token.special for token in added}
        self.size = max(len(tokenizer), *(i + 1 for i in self.added_ids), 0)

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [self._tokenizer.encode(t, add_special_tokens=add_special_tokens) for t in texts]

    def encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(
            [i for i in ids if i < self.size],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def id_to_token(self, token_id: int) -> str | None:
        token: str | None = None
        if token_id < self.size:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.convert_tokens_to_ids(token)
        return token_id


class Resolved(NamedTuple):
    """A tokenizer as found. special_tokens: "bos_token" and so on, to the token.
    extra_special_tokens: others that count as special. chat_templates: by name.
    response_template: what an answer has in it, as transformers is told; None if nothing says."""

    backend: Backend
    special_tokens: dict[str, str]
    extra_special_tokens: list[str]
    chat_templates: dict[str, str]
    response_template: Any = None


def resolve(path_or_id: str | Path, revision: str | None) -> Resolved:
    """The tokenizer of a checkpoint folder, or of a hub id at a revision. Raises anything."""
    folder = Path(path_or_id)
    if not folder.is_dir():
        return _from_transformers(str(path_or_id), revision)
    if (plain := _read_plain(folder)) is not None:
        return plain
    name = _kept_name(folder)
    for kept in cache_folders("tokenizers"):
        if (kept / name).is_file():
            return _read_kept(kept / name)
    _check_packages(folder)
    resolved = _from_transformers(str(folder), None)
    if isinstance(resolved.backend, FastBackend) and (backend := resolved.backend.to_json()):
        _keep(resolved, backend, name)
    return resolved


def _content(token: Any) -> str:
    """The text of a special token, which files write as a string or as an object."""
    return token if isinstance(token, str) else token["content"]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_plain(folder: Path) -> Resolved | None:
    """The tokenizer of a folder whose tokenizer.json says all that transformers would make of it,
    or None: then only transformers knows."""
    files = {path.name for path in folder.iterdir()}
    if not {"tokenizer.json", "tokenizer_config.json"} <= files or "tekken.json" in files:
        return None
    config = _read_json(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") not in _PLAIN_CLASSES or not set(config) <= _PLAIN_ENTRIES:
        return None
    if "config.json" in files:
        model_type = _read_json(folder / "config.json").get("model_type")
        if model_type not in _PLAIN_MODEL_TYPES:
            return None
    in_config = config.get("added_tokens_decoder")
    legacy = {"special_tokens_map.json", "added_tokens.json"} & files
    if in_config is None and legacy:
        return None

    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = backend.get_added_tokens_decoder()
    for token_id, token in (in_config or {}).items():
        if repr(tokenizers.AddedToken(**token)) != repr(added.get(int(token_id))):
            return None
    special = {k: _content(config[k]) for k in SPECIAL_TOKENS if config.get(k) is not None}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, list):
        return None
    extra = [_content(token) for token in extra]
    if not {*special.values(), *extra} <= {token.content for token in added.values()}:
        return None  # transformers would add them
    templates = _templates(config.get("chat_template"))
    files_of_templates = {"default": folder / "chat_template.jinja"}
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        files_of_templates[path.stem] = path
    in_files = {k: p.read_text("utf-8") for k, p in files_of_templates.items() if p.is_file()}
    response = config.get("response_template")
    return Resolved(FastBackend(backend), special, extra, in_files or templates, response)


def _templates(value: Any) -> dict[str, str]:
    """Chat templates by name: tokenizer_config.json has one, a list of named ones, or none."""
    if value is None:
        return {}
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return dict(value) if isinstance(value, dict) else {"default": value}


def _check_packages(folder: Path) -> None:
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        for package in ("sentencepiece", "google.protobuf"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(
                    f"tokenizer.model needs {package}: pip install 'manta-serve[sentencepiece]'"
                )


def load_transformers(
    path_or_id: str | Path, revision: str | None
) -> "transformers.PreTrainedTokenizerBase":
    """transformers' own tokenizer of a checkpoint folder, or of a hub id at a revision.

    Raises CheckpointError if transformers cannot load it.
    """
    try:
        loaded: transformers.PreTrainedTokenizerBase = _auto_tokenizer(str(path_or_id), revision)
    except Exception as error:  # transformers raises anything
        message = f"transformers cannot load a tokenizer from {str(path_or_id)!r}: {reason(error)}"
        raise CheckpointError(message) from error
    return loaded


def reason(error: BaseException) -> str:
    """Why a tokenizer cannot be loaded. transformers asks for its own option to trust code."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it is code of the checkpoint's own (auto_map), and manta runs none"
    return text


def _auto_tokenizer(path_or_id: str, revision: str | None) -> Any:
    settle_hub_cache()
    from transformers import AutoTokenizer

    options = {} if revision is None else {"revision": revision}
    return AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False, **options)


def _from_transformers(path_or_id: str, revision: str | None) -> Resolved:
    loaded = _auto_tokenizer(path_or_id, revision)
    special = loaded.special_tokens_map
    extra = [token for token in loaded.all_special_tokens if token not in special.values()]
    fast = getattr(loaded, "backend_tokenizer", None)
    backend: Backend = SlowBackend(loaded) if fast is None else FastBackend(fast)
    response = getattr(loaded, "response_template", None)
    return Resolved(backend, special, extra, _templates(loaded.chat_template), response)


def _kept_name(folder: Path) -> str:
    """The file in which the tokenizer that transformers makes of this folder is kept."""
    digest = hashlib.sha256(str(folder).encode())
    for package in _DECIDING_PACKAGES:
        try:
            digest.update(f"\0{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"\0{package} none".encode())
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.is_file():
            content = path.read_bytes()
            digest.update(f"\0{path.name} {len(content)}\0".encode() + content)
    return f"{digest.hexdigest()[:20]}.json"


def _keep(resolved: Resolved, backend: str, name: str) -> None:
    value = {**resolved._asdict(), "backend": backend}
    for folder in cache_folders("tokenizers"):
        with contextlib.suppress(OSError):  # without any, the next start is slow too
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                json.dump(value, file)
            os.replace(file.name, folder / name)
            return


def _read_kept(kept: Path) -> Resolved:
    import tokenizers

    value = _read_json(kept)
    backend = tokenizers.Tokenizer.from_str(value.pop("backend"))
    return Resolved(FastBackend(backend), **value)
