"""The parts of an answer, and what they fold to."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

MOST_SPACES = 1024  # that are held back


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. ``index`` counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments: text that, joined, is a JSON object."""

    index: int
    text: str


Part = Content | Reasoning | ToolCallStart | ToolCallArguments


@dataclass(slots=True)
class ToolCall:
    """A call of a folded answer; ``arguments`` is a JSON object as text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Folded:
    """Parts, put together; strings are empty where there was nothing."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, parts: Iterable[Part]) -> "Folded":
        """Itself, with further parts."""
        for part in parts:
            match part:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case ToolCallStart(_, id, name):
                    self.calls.append(ToolCall(id, name))
                case ToolCallArguments(index, text):
                    self.calls[index].arguments += text
        return self


class Writer:
    """Collects the parts that a format makes.

    most_calls: further ones are left out; None is no bound. short_ids: ids of 9 characters, as
    Mistral's templates want them. trims: spaces around content and calls belong to the format, not
    to the content.
    """

    def __init__(self, most_calls: int | None = None) -> None:
        self.most_calls = most_calls
        self.short_ids = False
        self.trims = True
        self._parts: list[Part] = []
        self._calls = 0
        self._held = ""  # spaces that are shown only if text follows
        self._wide = False  # these are so many that they are shown
        self._thinks = False
        self._fresh = False  # nothing has been said since the last boundary

    def content(self, text: str) -> None:
        """Text for the user."""
        if self._thinks:
            self.boundary()
        self._write(text, self.trims)

    def reasoning(self, text: str) -> None:
        """Text that the model thinks; spaces at its ends are left out."""
        if not self._thinks:
            self.boundary()
            self._thinks = True
        self._write(text, True)

    def call(self, name: str, arguments: str, id: str | None = None) -> None:
        """A whole call."""
        if self._thinks or self.trims:
            self.boundary()
        if self.most_calls is not None and self._calls >= self.most_calls:
            return
        unique = uuid.uuid4().hex
        id = id or (unique[:9] if self.short_ids else f"call_{unique[:24]}")
        self._parts.append(ToolCallStart(self._calls, id, name))
        self._parts.append(ToolCallArguments(self._calls, arguments))
        self._calls += 1

    def boundary(self) -> None:
        """Here ends what was said: spaces before it and after it are no part of it."""
        self._held, self._fresh, self._thinks = "", True, False

    def finish(self) -> None:
        """The output is over: spaces at its end are its own."""
        self._append(self._held)
        self._held = ""

    def take(self) -> list[Part]:
        """The parts since the last time, neighbours of a kind joined."""
        taken, self._parts = self._parts, []
        return taken

    def _write(self, text: str, trims: bool) -> None:
        if self._fresh:
            text = text.lstrip()
        if trims:
            text = self._held + text
            shown = text.rstrip()
            held = text[len(shown) :]
            self._wide = len(held) > MOST_SPACES or (self._wide and not shown)
            self._held, text = ("", text) if self._wide else (held, shown)
        if text:
            self._fresh = False
            self._append(text)

    def _append(self, text: str) -> None:
        if not text:
            return
        kind = Reasoning if self._thinks else Content
        last = self._parts[-1] if self._parts else None
        if isinstance(last, kind):
            self._parts[-1] = kind(last.text + text)
        else:
            self._parts.append(kind(text))
