"""Control tokens that users write: ``<|im_end|>`` in a message, say.

A rendered chat is one text, in which the tokenizer makes tokens of what the template wrote and of
what users wrote alike. To tell them apart, what users wrote is marked before the template sees it
and encoded as ordinary text afterwards. The method is transformers' ``sanitize_control_tokens``
(``transformers.utils.chat_template_utils``), with the same marks.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from engine.errors import RequestError

_START, _END = "\U000f0000", "\U000f0001"  # of the private use area; dropped where users write them
_MARKS = re.compile(f"[{_START}{_END}]")


class Piece(NamedTuple):
    """A piece of a rendered chat; ``written`` by a user, it is a control token in name only."""

    text: str
    written: bool


def marked(value: Any, tokens: Iterable[str]) -> Any:
    """``value``, messages or tools, with every one of the control ``tokens`` in its strings marked.
    Keys are left as they are."""
    pattern = _pattern(frozenset(tokens))

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(f"{_START}\\g<0>{_END}", _MARKS.sub("", value))
        if isinstance(value, Mapping):
            return {key: mark(inner) for key, inner in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [mark(inner) for inner in value]
        return value

    return mark(value)


def unmarked(text: str) -> str:
    """A rendered chat as the template would have made it without marks."""
    return _MARKS.sub("", text)


def pieces(text: str, tokens: Iterable[str]) -> list[Piece]:
    """A marked chat in pieces. tokens: all that the tokenizer has.

    A template may have parted a mark from its token: that one breaks the text, and is dropped.
    """
    whole = f"{_START}({_pattern(frozenset(tokens)).pattern}){_END}|[{_START}{_END}]"
    split = re.split(whole, text)
    return [Piece(part, i % 2 == 1) for i, part in enumerate(split) if part]


def encoded(
    parts: Sequence[Piece],
    encode: Callable[[str], list[int]],
    encode_plain: Callable[[str], list[int]],
    id_of: Callable[[str], int | None],
) -> list[int]:
    """The token ids of a chat's pieces.

    encode, encode_plain: the token ids of a text, with and without added tokens. Raises
    RequestError for a control token that is made of ordinary text.
    """
    newline = encode("\n")
    ids: list[int] = []
    for i, (text, written) in enumerate(parts):
        how = encode_plain if written else encode
        # Behind a newline, lest SentencePiece put a space before it.
        behind = how("\n" + text) if i or written else []
        cut = newline and behind[: len(newline)] == newline
        found = behind[len(newline) :] if cut else how(text)
        if written and id_of(text) in found:
            raise RequestError(
                f"messages must not have {text!r}: this tokenizer takes it for a control token"
                " wherever it stands"
            )
        ids += found
    return ids


@functools.lru_cache(maxsize=64)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    """Any of ``tokens``, the longest that matches."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
