"""What formats read from: text that comes in pieces.

A format is written as if all text were there. Where there is none left it yields, and goes on when
more has come; ``Ended`` says that none will.
"""

import json
import re
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
PATIENCE = 1 << 22  # characters of what looked like calls and was none
MARGIN = 256  # most characters that a pattern of ``Source.until`` may match


class Ended(Exception):
    """The output is over in the middle of something."""


class Malformed(Exception):
    """What looked like a call is none."""


class Tags:
    """A set of strings to be found in a text that comes in pieces."""

    def __init__(self, tags: Iterable[str]) -> None:
        longest_first = sorted(set(tags), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._begun = {tag[:end] for tag in longest_first for end in range(1, len(tag))}
        self._longest = max(map(len, longest_first), default=1)

    def find(self, text: str, at: int) -> re.Match[str] | None:
        """The first of them from ``at`` on."""
        return self._pattern.search(text, at)

    def held_from(self, text: str, at: int) -> int:
        """Where an end of the text begins that could become one of them."""
        for begin in range(max(at, len(text) - self._longest + 1), len(text)):
            if text[begin:] in self._begun:
                return begin
        return len(text)

    def without(self, text: str) -> str:
        """The text without them."""
        return self._pattern.sub("", text)


NO_TAGS = Tags(())


class Source:
    """The text so far, and how far it is read.

    hidden: strings that are left out wherever they come. ``cut`` says that the output did not end
    by itself. ``patience``: how many characters may yet be read in vain.
    """

    def __init__(self, hidden: Tags = NO_TAGS) -> None:
        self.text = ""
        self.at = 0
        self.ended = self.cut = False
        self.patience = PATIENCE
        self._hidden = hidden
        self._begun = ""  # of a hidden string

    def feed(self, text: str) -> None:
        """More text. What is read goes, so do not hold places between two calls of ``yield``
        unless ``at`` stands still."""
        text = self._hidden.without(self._begun + text)
        held = len(text) if self.ended else self._hidden.held_from(text, 0)
        self._begun = text[held:]
        self.text += text[:held]

    def forget(self) -> None:
        """Let go of what is read; nobody may hold a place in it."""
        self.text, self.at = self.text[self.at :], 0

    # ---- reading ----

    def more(self) -> Reading[None]:
        """Wait for more text. Raises Ended if there is none."""
        if self.ended:
            raise Ended
        yield

    def spaces(self) -> Reading[None]:
        """Pass over white space. Raises Ended if there is nothing else."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return
                self.at += 1
            yield from self.more()

    def next_is(self, *tags: str) -> Reading[str | None]:
        """The first of ``tags`` with which the text goes on; None if with none of them."""
        while True:
            for tag in tags:
                if self.text.startswith(tag, self.at):
                    return tag
            rest = self.text[self.at :]
            if self.ended or not any(tag.startswith(rest) for tag in tags):
                return None
            yield

    def skip(self, *tags: str) -> Reading[bool]:
        """Pass over one of ``tags`` with which the text goes on; whether it does."""
        tag = yield from self.next_is(*tags)
        self.at += len(tag or "")
        return tag is not None

    def expect(self, *tags: str) -> Reading[None]:
        """Pass over one of ``tags``. Raises Malformed if none is there."""
        if not (yield from self.skip(*tags)):
            raise Ended if self.ended and self.at == len(self.text) else Malformed

    def close(self, *tags: str) -> Reading[bool]:
        """Pass over white space and one of ``tags``, if they follow; whether they do."""
        if not (yield from self.goes_on(*tags)):
            return False
        return (yield from self.skip(*tags))

    def goes_on(self, *tags: str) -> Reading[bool]:
        """Pass over white space if one of ``tags`` follows it; whether one does."""
        begin = self.at
        try:
            yield from self.spaces()
            if (yield from self.next_is(*tags)) is not None:
                return True
        except Ended:
            pass
        self.at = begin
        return False

    def until(
        self, pattern: re.Pattern[str], at_end: re.Pattern[str] | None = None
    ) -> Reading[tuple[str, re.Match[str]]]:
        """The text before the first match of ``pattern``, and the match, which is passed over.

        The pattern matches at most ``MARGIN`` characters, what it looks ahead at among them.
        at_end: what else does when the output is over. Raises Ended if nothing does.
        """
        begin = seen = self.at
        while True:
            match = pattern.search(self.text, seen)
            if match is None and self.ended and at_end is not None:
                match = at_end.search(self.text, begin)
            if match is not None:
                self.at = match.end()
                return self.text[begin : match.start()], match
            seen = max(begin, len(self.text) - MARGIN)
            yield from self.more()

    def json(self) -> Reading[str]:
        """The text of the JSON object or array that begins here.

        Only its end is looked for. Raises Malformed if none begins here.
        """
        while self.at == len(self.text):
            yield from self.more()
        if self.text[self.at] not in "{[":
            raise Malformed
        return (yield from self.bracketed(_JSON))

    def bracketed(self, token: "Brackets") -> Reading[str]:
        """The text from the bracket that stands here to the one that closes it."""
        begin = at = self.at
        open_brackets: list[str] = []
        quote = ""
        while True:
            pattern = token.inside[quote] if quote else token.outside
            match = pattern.search(self.text, at)
            if match is None or (match[0] == "\\" and match.end() == len(self.text)):
                at = match.start() if match else max(at, len(self.text) - token.longest + 1)
                yield from self.more()
                continue
            at, mark = match.end(), match[0]
            if mark == "\\":
                at += 1
            elif quote:
                quote = ""
            elif mark in token.inside:
                quote = mark
            elif mark in "{[(":
                open_brackets.append("}])"["{[(".index(mark)])
            elif not open_brackets or open_brackets.pop() != mark:
                raise Malformed
            elif not open_brackets:
                self.at = at
                return self.text[begin:at]


class Brackets:
    """What counts in a text with brackets: the quotes of strings, and whether they have escapes."""

    def __init__(self, quotes: Iterable[str], escapes: bool = True) -> None:
        quotes = list(quotes)
        self.longest = max(map(len, quotes))
        self.outside = re.compile("|".join([r"[][{}()]", *map(re.escape, quotes)]))
        escape = r"|\\" if escapes else ""
        self.inside = {quote: re.compile(re.escape(quote) + escape) for quote in quotes}


_JSON = Brackets('"')
PYTHON = Brackets("'\"")


def loads(text: str) -> object:
    """The value of JSON; raw line ends in strings are let pass.

    Raises Malformed for what is no JSON, NaN and Infinity among it.
    """
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Malformed from None


def dumps(value: object) -> str:
    """JSON that can be written as UTF-8. Raises Malformed for what JSON has not."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which an escape can write
        return json.dumps(value)
    except (ValueError, RecursionError, TypeError):
        raise Malformed from None
    return text


def _refuse(name: str) -> None:
    raise ValueError(name)
