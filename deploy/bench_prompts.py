"""Prompts to measure a server with: random token ids, or those of a file."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deploy.server_client import ServerClient, ServerError
from engine.errors import ConfigError

# Tokenized by the server to learn some of its token ids, when there is no tokenizer here.
WORDS = """the of and a to in is you that it he was for on are as with his they I at be this have
from or one had by word but not what all were we when your can said there use an each which she do
how their if will up other about out many then them these so some her would make like him into time
has look two more write go see number no way could people my than first water been call who oil its
now find long down day did get come made may part over new sound take only little work know place
year live me back give most very after thing our just name good sentence man think say great where
help through much before line right too mean old any same tell boy follow came want show also around
form three small set put end does another well large must big even such because turn here why ask
went men read need land different home us move try kind hand picture again change off play spell air
away animal house point page letter mother answer found study still learn should America world"""


@dataclass(frozen=True)
class Sample:
    """A prompt (text, or token ids) and how many tokens of output to ask for."""

    prompt: str | list[int]
    output_len: int


class Codec(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...


class ServerCodec:
    """The server's own tokenizer, over ``/tokenize`` and ``/detokenize``."""

    def __init__(self, client: ServerClient, model: str) -> None:
        self._client, self._model = client, model

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        ids = self._call("/tokenize", body)["tokens"]
        assert isinstance(ids, list)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return str(self._call("/detokenize", {"model": self._model, "tokens": ids})["prompt"])

    def _call(self, path: str, body: dict[str, Any]) -> Any:
        try:
            return self._client.call(path, body)
        except ServerError as error:
            raise ConfigError(
                f"the server has no {path} ({error}); give --tokenizer, a folder or hub id"
            ) from None


class LocalCodec:
    """A checkpoint's tokenizer, in this process."""

    def __init__(self, path_or_id: str) -> None:
        from engine.tokenizer import Tokenizer

        self._tokenizer = Tokenizer.load(path_or_id)

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids)


def random_samples(
    codec: Codec,
    count: int,
    input_len: int,
    output_len: int,
    range_ratio: float,
    prefix_len: int,
    as_text: bool,
    seed: int,
) -> list[Sample]:
    """Prompts of random tokens: none shares more than the ``prefix_len`` first ones with another.

    Lengths are uniform within ``range_ratio`` of what is asked for. As text they may have a few
    tokens more or less once they are tokenized again.
    """
    draw = random.Random(seed)
    vocabulary = sorted(set(codec.encode(" ".join(WORDS.split()))))

    def tokens(n: int) -> list[int]:
        return [draw.choice(vocabulary) for _ in range(n)]

    def length(n: int) -> int:
        return draw.randint(max(1, round(n * (1 - range_ratio))), round(n * (1 + range_ratio)))

    prefix = tokens(prefix_len)
    samples = []
    for _ in range(count):
        ids = prefix + tokens(length(input_len))
        samples.append(Sample(codec.decode(ids) if as_text else ids, length(output_len)))
    return samples


def file_samples(
    read: Callable[[Path], list[tuple[str, int | str | None]]],
    path: str,
    codec: Codec,
    count: int,
    output_len: int | None,
    shuffle: bool,
    seed: int,
) -> list[Sample]:
    """``count`` prompts of a file, again from its start where it has fewer.

    output_len: for all of them; by default each has the length of the answer that the file has
    with it, else 256.
    """
    try:
        found = read(Path(path))
    except OSError as error:
        raise ConfigError(f"--dataset-path: cannot read {path!r}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--dataset-path: {path!r} is not as expected: {error!r}") from None
    if not found:
        raise ConfigError(f"--dataset-path: {path!r} has no prompts")
    draw = random.Random(seed)
    if shuffle:
        draw.shuffle(found)
    chosen = (found * (count // len(found) + 1))[:count]
    lengths: dict[str, int] = {}

    def length(answer: int | str | None) -> int:
        if output_len is not None or answer is None:
            return 256 if output_len is None else output_len
        if isinstance(answer, int):
            return answer
        if answer not in lengths:
            lengths[answer] = max(1, len(codec.encode(answer)))
        return lengths[answer]

    return [Sample(prompt, length(answer)) for prompt, answer in chosen]


def read_sharegpt(path: Path) -> list[tuple[str, int | str | None]]:
    """The first message and its answer of each conversation, in JSON or JSONL.

    Conversations have ShareGPT's shape (``conversations`` of ``from`` and ``value``) or OpenAI's
    (``messages`` of ``role`` and ``content``).
    """
    samples: list[tuple[str, int | str | None]] = []
    for entry in _entries(path):
        turns = entry.get("conversations") or entry.get("messages") or []
        texts = [str(turn.get("value", turn.get("content", ""))) for turn in turns]
        roles = [turn.get("from", turn.get("role")) for turn in turns]
        if roles and roles[0] == "system":
            texts = texts[1:]
        if len(texts) >= 2 and texts[0].strip():
            samples.append((texts[0], texts[1]))
    return samples


def read_custom(path: Path) -> list[tuple[str, int | str | None]]:
    """JSON or JSONL with ``prompt`` (and ``output_tokens``), or plain text, a prompt a line."""
    if path.suffix not in (".json", ".jsonl"):
        return [(line, None) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [(str(entry["prompt"]), entry.get("output_tokens")) for entry in _entries(path)]


READERS = {"sharegpt": read_sharegpt, "custom": read_custom}


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    values: Sequence[Any]
    if text.lstrip().startswith("["):
        values = json.loads(text)
    else:
        values = [json.loads(line) for line in text.splitlines() if line.strip()]
    for value in values:
        if not isinstance(value, dict):
            raise ValueError(f"an entry is {str(value)[:60]!r}, not an object")
        yield value
