"""How whole answers are written: text with thinking and calls in it."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable

from engine.errors import RequestError
from engine.parsing.calls import CallFormat
from engine.parsing.parts import Writer
from engine.parsing.source import Ended, Malformed, Reading, Source, Tags
from engine.parsing.structure import CallLayout
from engine.parsing.thinking import Thinking
from engine.parsing.values import Tools
from engine.thinking import ThinkingBudget


class AnswerFormat(ABC):
    """How an answer is written, from its first character to its last.

    tags: the strings of the format; those that are special tokens must be in the text. thinks,
    calls: whether it has reasoning, and calls. layouts: how calls are written where that can be
    enforced, as the beginning of an answer; marked: how they are found in text. thoughts: what
    thinking stands between; unthinkable: what it has not, for that would end it. said: what text
    for the user begins with.
    """

    tags: tuple[str, ...]
    thinks = True
    calls = True
    layouts: tuple[CallLayout, ...] = ()
    marked: tuple[CallLayout, ...] = ()
    thoughts: tuple[tuple[str, str], ...] = ()
    unthinkable: tuple[str, ...] = ()
    said = ""

    @abstractmethod
    def read(self, source: Source, out: Writer, tools: Tools, opened: bool) -> Reading[None]:
        """Read all of it. ``opened``: whether the prompt has begun the thinking."""

    @abstractmethod
    def opened_by(self, prompt: str, final: str = "") -> bool:
        """See ``Thinking.opened_by``."""

    @abstractmethod
    def prefix(self, name: str | None, opened: bool) -> str | None:
        """What makes the answer begin with a call: of the tool ``name``, or of any; None if the
        format has no such thing."""


class TaggedAnswer(AnswerFormat):
    """Content, with thinking between tags before it and calls in it; either may be None."""

    def __init__(self, thinking: Thinking | None, calls: CallFormat | None) -> None:
        self._thinking, self._calls = thinking, calls
        self.thinks, self.calls = thinking is not None, calls is not None
        self.layouts = self.marked = calls.layouts if calls else ()
        if thinking:
            self.thoughts = tuple(itertools.product(thinking.openers, thinking.closers))
        self._openers = calls.openers if calls else ()
        self.tags = (thinking.tags if thinking else ()) + self._openers
        self.tags += calls.tags if calls else ()
        self._bare = calls.bare_openers if calls else ()
        marks = tuple(opener for opener in self._openers if opener not in self._bare)
        self._in_content = Tags(marks)
        ends = marks if calls and calls.ends_reasoning else ()
        self.unthinkable = ends
        self._in_thinking = Tags((*(thinking.closers if thinking else ()), *ends))

    def opened_by(self, prompt: str, final: str = "") -> bool:
        return self._thinking is not None and self._thinking.opened_by(prompt, final)

    def prefix(self, name: str | None, opened: bool) -> str | None:
        prefix = self._calls.prefix(name) if self._calls else None
        closed = f"{self._thinking.closers[0]}\n\n" if opened and self._thinking else ""
        return None if prefix is None else closed + prefix

    def read(self, source: Source, out: Writer, tools: Tools, opened: bool) -> Reading[None]:
        if self._calls:
            out.trims, out.short_ids = self._calls.trims, self._calls.short_ids
        if opened:
            yield from self._think(source, out, tools)
        fresh = True
        while True:
            if fresh:
                yield from self._begin(source, out, tools)
            found = yield from said(source, self._in_content, out.content)
            if found is None:
                return
            fresh = yield from self._call_or_say(source, out, tools, found, out.content)

    def _begin(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        """What stands only where nothing is said: thinking, and calls without a mark."""
        thinking = self._thinking.openers if self._thinking else ()
        while thinking or self._bare:
            begin = source.at
            try:
                yield from source.spaces()
            except Ended:
                source.at = begin
                return
            tag = yield from source.next_is(*thinking, *self._bare)
            if tag in thinking:
                source.at += len(tag or "")
                yield from self._think(source, out, tools)
            elif tag is None or not (yield from self._call(source, out, tools, out.content)):
                source.at = begin
                return
            else:
                thinking = ()

    def _think(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        assert self._thinking is not None
        while (found := (yield from said(source, self._in_thinking, out.reasoning))) is not None:
            if source.text[source.at : found] in self._thinking.closers:
                source.at = found
                out.boundary()
                return
            if (yield from self._call_or_say(source, out, tools, found, out.reasoning)):
                return

    def _call_or_say(
        self, source: Source, out: Writer, tools: Tools, end: int, say: Callable[[str], None]
    ) -> Reading[bool]:
        """Read a call; whether there was one. If not, what looked like its opener is said."""
        if (yield from self._call(source, out, tools, say)):
            return True
        say(source.text[source.at : end])
        source.at = end
        return False

    def _call(
        self, source: Source, out: Writer, tools: Tools, say: Callable[[str], None]
    ) -> Reading[bool]:
        """Read a call; whether there was one. One that is unfinished at the output's end is left
        out if that was cut off, and said otherwise."""
        assert self._calls is not None
        if source.patience < 0:
            return False
        begin, bare = source.at, source.text.startswith(self._bare or "\0", source.at)
        try:
            yield from self._calls.read(source, out, tools)
        except Malformed:
            source.patience -= len(source.text) - source.at
            return source.at > begin
        except Ended:
            if bare:
                return source.at > begin
            if not source.cut:
                say(source.text[source.at :])
            source.at = len(source.text)
        return True


def said(source: Source, tags: Tags, say: Callable[[str], None]) -> Reading[int | None]:
    """Say all up to the first of ``tags``: where that ends, or None if there is none."""
    while True:
        found = tags.find(source.text, source.at)
        if found is not None:
            end = found.start()
        else:
            end = len(source.text)
            if not source.ended:
                end = tags.held_from(source.text, source.at)
        if end > source.at:
            say(source.text[source.at : end])
        source.at = end
        source.forget()
        if found is not None:
            return len(found[0])
        if source.ended:
            return None
        yield


def thinking_budget(form: AnswerFormat | None, most: int, opened: bool) -> ThinkingBudget:
    """At most so many tokens of thinking in answers of a format. ``opened``: whether the prompt has
    begun it.

    Raises RequestError for a format that has none.
    """
    if form is None or not form.thoughts:
        raise RequestError(
            "thinking_token_budget: it is not known how this model marks its thinking; a server's"
            " option --reasoning-parser names a format"
        )
    openers, closers = (tuple(dict.fromkeys(marks)) for marks in zip(*form.thoughts, strict=True))
    return ThinkingBudget(most, opened, openers, closers, form.unthinkable)
