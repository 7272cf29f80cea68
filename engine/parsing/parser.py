"""A parser: pieces of text in, parts out."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.parsing.answers import AnswerFormat
from engine.parsing.parts import Part, Writer
from engine.parsing.source import NO_TAGS, Source, Tags
from engine.parsing.values import Tools


class Parser:
    """Takes one answer apart, as it comes.

    tools: those that were offered, as OpenAI's API has them. opened: whether the prompt has begun
    the thinking. most_calls: further calls are left out. hidden: strings (special tokens) that are
    in the text and not for the user. However the text is cut, the parts fold to the same.
    """

    def __init__(
        self,
        form: AnswerFormat,
        tools: Sequence[Mapping[str, Any]] = (),
        opened: bool = False,
        most_calls: int | None = None,
        hidden: Tags = NO_TAGS,
    ) -> None:
        self._source = Source(hidden)
        self._out = Writer(most_calls)
        self._reading = form.read(self._source, self._out, Tools(tools), opened)
        self._go_on()

    def push(self, text: str) -> list[Part]:
        """The parts that further text makes certain."""
        if not text:
            return []
        self._source.feed(text)
        self._go_on()
        return self._out.take()

    def finish(self, cut: bool) -> list[Part]:
        """The parts of what was held back. ``cut``: the output did not end by itself: a call in
        the middle of which it ended is left out; otherwise its text is content."""
        self._source.ended, self._source.cut = True, cut
        self._source.feed("")
        self._go_on()
        self._out.finish()
        return self._out.take()

    def _go_on(self) -> None:
        next(self._reading, None)
