"""How tool calls stand in a text: what a format of calls is."""

import json
from abc import ABC, abstractmethod

from engine.parsing.parts import Writer
from engine.parsing.source import Malformed, Reading, Source, dumps, loads
from engine.parsing.structure import CallLayout
from engine.parsing.values import Tools


class CallFormat(ABC):
    """A format in which calls stand between other text.

    openers: what begins one, or several. bare_openers: those that do so only where nothing was
    said before, as they may begin an answer as well. tags: further strings of the format; those
    that are special tokens must be in the text. ends_reasoning: whether a call may end the model's
    thinking. trims, short_ids: see ``Writer``. layouts: how calls are written where that can be
    enforced, by their opener; the model's own way is the first.
    """

    openers: tuple[str, ...]
    bare_openers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    ends_reasoning = False
    trims = True
    short_ids = False
    layouts: tuple[CallLayout, ...] = ()

    @abstractmethod
    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        """Read what begins with an opener, which is where the source is.

        Raises Malformed if it is no call, Ended if it is unfinished; either leaves the calls that
        were whole, and ``source.at`` after them.
        """

    def prefix(self, name: str | None) -> str | None:
        """How a call begins: of the tool ``name``, or of any; None if that cannot be said."""
        return self.layouts[0].begin(name)


class Unfinished:
    """A with block that takes the source back to where it began, or to the last ``whole``, if
    what stands there is no call."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = source.at

    def whole(self) -> None:
        """All up to here is read for good."""
        self._at = self._source.at

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._source.at = self._at


def arguments_of(text: str) -> str:
    """The JSON object that a call's arguments are, as it was written if that is JSON.

    Raises Malformed if it is no object.
    """
    value = loads(text)
    if not isinstance(value, dict):
        raise Malformed
    try:
        json.loads(text, object_pairs_hook=_unique)
        text.encode()
    except (ValueError, UnicodeEncodeError):
        return dumps(value)
    dumps(value)  # no infinite number
    return text.strip()


def _unique(pairs: list[tuple[str, object]]) -> None:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice")


def write_call(value: object, out: Writer) -> None:
    """A call that is an object: {"name": ..., "arguments" or "parameters": {...}}.

    Raises Malformed if it is none.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = {**value, **value["function"]}
    if not isinstance(value, dict):
        raise Malformed
    name = value.get("name", value.get("tool_name"))
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments or {}, dict):
        raise Malformed
    id = value.get("id", value.get("tool_call_id"))
    out.call(name, dumps(arguments or {}), id if isinstance(id, str) and id else None)


def write_calls(values: object, out: Writer) -> None:
    """One call, or a list of them; all or none. Raises Malformed as ``write_call`` does."""
    calls = values if isinstance(values, list) else [values]
    for one in calls:
        write_call(one, Writer())
    for one in calls:
        write_call(one, out)
