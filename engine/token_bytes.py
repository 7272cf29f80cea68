"""Tokens as bytes, which makes incremental detokenization exact and cheap.

For two families of tokenizers the text is nothing but the tokens' bytes, joined and read as UTF-8:
byte-level BPE (GPT-2, OPT, Llama 3, Qwen) and SentencePiece with byte fallback (Llama 2, Mistral).
So a stream need only remember the bytes of an unfinished character. Other decoders depend on a
token's neighbours; ``engine.text`` decodes those by windows.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"  # SentencePiece writes a space so


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet (Radford et al. 2019): printable Latin-1 stands for itself, the other bytes
    for the characters from U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[c] for c in token])
    except KeyError:  # an added token, outside the alphabet: its own text
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if match := _FALLBACK_BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE_MARK, " ").encode()


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece shows U+FFFD for each byte that is no part of a character, Unicode (and ByteLevel)
# one for a whole truncated sequence, which is Python's "replace".
codecs.register_error("manta-sentencepiece", _one_mark_per_byte)


class TokenBytes(dict[int, bytes]):
    """The bytes of each token id, filled on first use; ids outside the vocabulary have none."""

    def __init__(self, token_of: Callable[[int], str | None], bytes_of: Callable[[str], bytes]):
        super().__init__()
        self._token_of = token_of
        self._bytes_of = bytes_of

    def __missing__(self, token_id: int) -> bytes:
        token = self._token_of(token_id)
        data = self[token_id] = b"" if token is None else self._bytes_of(token)
        return data


class ByteDecoder:
    """How the tokens of one tokenizer become bytes.

    all: bytes of every token. shown: the same, with special tokens empty.
    errors: Python's name for what broken UTF-8 becomes.
    strips_first_space: the first space of a text is the tokenizer's own, not the text's.
    """

    def __init__(
        self, backend: "tokenizers.Tokenizer", bytes_of: Callable[[str], bytes], errors: str,
        strips_first_space: bool,
    ):  # fmt: skip
        self.all = TokenBytes(backend.id_to_token, bytes_of)
        self.shown = TokenBytes(backend.id_to_token, bytes_of)
        added = backend.get_added_tokens_decoder()
        self.shown.update({i: b"" for i, token in added.items() if token.special})
        self.errors = errors
        self.strips_first_space = strips_first_space

    def text(self, data: bytes, final: bool = False) -> tuple[str, int]:
        """The text of UTF-8 bytes and how many of them it used: all of them if ``final``."""
        return codecs.utf_8_decode(data, self.errors, final)

    def unfinished(self, context_ids: Sequence[int], known: TokenBytes) -> tuple[bytes, bool]:
        """The bytes of an unfinished character at the end of the context, and if it has no text."""
        tail = b""
        for token_id in reversed(context_ids):
            tail = known[token_id] + tail
            if len(tail) > 3:  # so the first byte of an unfinished character is among them
                break
        return tail[self.text(tail)[1] :], not tail


def byte_decoder(backend: "tokenizers.Tokenizer") -> ByteDecoder | None:
    """The byte decoder that does what the backend's decoder does, or None where none can."""
    if backend.decoder is None:
        return None
    steps: list[dict[str, Any]] = [json.loads(backend.decoder.__getstate__())]
    while len(steps) == 1 and steps[0]["type"] == "Sequence":
        steps = steps[0]["decoders"]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteDecoder(backend, _byte_level, "replace", strips_first_space=False)
    sentencepiece = [
        {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if steps in (sentencepiece, [*sentencepiece, strip]):
        errors = "manta-sentencepiece"
        return ByteDecoder(backend, _byte_fallback, errors, strips_first_space=len(steps) == 4)
    return None
