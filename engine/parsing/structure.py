"""Answers whose tool calls are of the form that their tools ask for: a format of a structural tag.

A format of calls says how it writes them (``CallLayout``); of that, and of the tools' schemas, the
answer's structure is made, which a grammar enforces (``engine.structural_tag``).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from engine.parsing.values import types_of
from engine.structural_tag import Format

Schema = Mapping[str, Any]
NUMBER = "{number}"
_NUMBER: Format = {"type": "regex", "pattern": "[0-9]{1,3}"}
_SPACES: Format = {"type": "regex", "pattern": "[ \\r\\n\\t]{0,8}"}
_NO_CALL: Format = {"type": "regex", "pattern": "(?s:\\s*([^{\\s].*)?)"}
_KEY = re.compile(r'[^<>"\n]{1,128}')
_OF_ALL = {
    "type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema",
    "title", "description", "$comment",
}  # fmt: skip
_ABOUT = {"type", "title", "description", "default", "examples", "$comment", "anyOf"}


@dataclass(frozen=True)
class CallLayout:
    """How calls are written: in blocks of ``open``, calls with ``between`` between them, ``close``.
    A call is ``head``, in which {name} is the tool's and {number} any, its arguments, and ``tail``.

    trigger: what ``open`` begins with and no other text has; "" where calls without a mark may be
        all of an answer.
    between: None if a block has one call. apart: what stands between blocks; None if there is one
        at most, after which nothing comes.
    parameter: what stands around each argument if they are no JSON object: {key} is its name,
        {string} whether it is a string. Strings stand there as they are.
    """

    trigger: str
    open: str
    head: str
    tail: str
    close: str = ""
    between: str | None = None
    apart: str | None = None
    parameter: tuple[str, str] | None = None

    def begin(self, name: str | None) -> str:
        """How calls begin: of the tool ``name``, or of any."""
        if name is None:
            return self.open + self.head.partition("{name}")[0]
        return self.open + self.head.replace("{name}", name).replace(NUMBER, "0")

    def calls(self, tools: Mapping[str, Schema | None], one: bool) -> Format:
        """Blocks of calls of ``tools``, whose arguments are of their schema; None is any. ``one``:
        there is one call.

        Raises RequestError for what could not be enforced here.
        """
        return _separated([self.block(tools, one)], None if one else self.apart)

    def block(self, tools: Mapping[str, Schema | None], one: bool) -> Format:
        """One of ``calls``."""
        calls = [self._call(name, schema) for name, schema in tools.items()]
        content = _separated(calls, None if one else self.between)
        return {"type": "tag", "begin": self.open, "content": content, "end": self.close}

    def _call(self, name: str, schema: Schema | None) -> Format:
        before, number, after = self.head.replace("{name}", name).partition(NUMBER)
        content = self.arguments(schema)
        if number:
            content = _sequence([_NUMBER, _const(after), content])
        return {"type": "tag", "begin": before, "content": content, "end": self.tail}

    def arguments(self, schema: Schema | None) -> Format:
        """Those that ``schema`` allows. Raises RequestError for what could not be enforced here."""
        if self.parameter is None:
            return _json({"type": "object"} if schema is None else schema)
        if schema is None:
            return {"type": "any_text"}
        if more := schema.keys() - _OF_ALL:
            raise RequestError(f"{min(more)} cannot be enforced where arguments stand one by one")
        properties, required = schema.get("properties") or {}, schema.get("required") or ()
        found = [self._argument(key, schema, key in required) for key in properties]
        return _sequence(found) if found else _const("")

    def _argument(self, key: str, schema: Schema, required: bool) -> Format:
        assert self.parameter is not None
        if not _KEY.fullmatch(key):
            raise RequestError(f"the name {key!r} cannot be written in this format")
        about = schema["properties"][key]
        text = "string" in (types := types_of(about, schema)) or not types
        begin, end = (
            mark.replace("{key}", key).replace("{string}", str(text).lower())
            for mark in self.parameter
        )
        content = _text(key, about) if text else _json(_rooted(about, schema))
        tag = {"type": "tag", "begin": begin, "content": content, "end": end}
        return tag if required else _any([tag, _const("")])


def answer(
    layouts: Sequence[CallLayout],
    tools: Mapping[str, Schema | None],
    forced: bool,
    one: bool,
    content: Format | None,
) -> Format:
    """What follows the thinking.

    forced: it is calls. one: at most one. content: what it is if it is no call; None is any text.
    Raises RequestError for what could not be enforced here.
    """
    if forced:
        return layouts[0].calls(tools, one)
    if content is not None:
        return _any([content, layouts[0].calls(tools, one)])
    if not all(layout.trigger for layout in layouts):
        return _any([_NO_CALL, layouts[0].calls(tools, one)])
    return {
        "type": "triggered_tags",
        "triggers": [layout.trigger for layout in layouts],
        "tags": [layout.block(tools, one) for layout in layouts],
        "stop_after_first": one or any(layout.apart is None for layout in layouts),
    }


def after_thinking(
    form: Format, thoughts: Iterable[tuple[str, str]], unthinkable: Sequence[str], opened: bool
) -> Format:
    """``form`` after thinking between any of the marks ``thoughts``, which is free but for the
    strings ``unthinkable``. ``opened``: whether the prompt has begun it."""
    text = {"type": "any_text", "excludes": list(unthinkable)}
    marks = dict.fromkeys(("" if opened else begin, end) for begin, end in thoughts)
    tags: list[Format] = [
        {"type": "tag", "begin": begin, "content": text, "end": end} for begin, end in marks
    ]
    if not tags:
        return form
    thought = _sequence([_any(tags), _SPACES])
    return _sequence([thought if opened else _any([thought, _const("")]), form])


def _text(key: str, about: Any) -> Format:
    """A string as it is: free, or one of a list. Raises RequestError, naming what else is asked."""
    about = about if isinstance(about, Mapping) else {}
    values = [about["const"]] if "const" in about else about.get("enum")
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return _any(map(_const, values))
    for one in (about, *(about.get("anyOf") or ())):
        if more := (one.keys() if isinstance(one, Mapping) else set()) - _ABOUT:
            raise RequestError(
                f"{min(more)} of {key!r} cannot be enforced where strings are written as they are"
            )
    return {"type": "any_text"}


def _rooted(about: Any, schema: Schema) -> Schema:
    """The schema of a property, by itself."""
    return {**about, **{name: schema[name] for name in ("$defs", "definitions") if name in schema}}


def _const(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _json(schema: Schema) -> Format:
    return {"type": "json_schema", "json_schema": schema}


def _sequence(elements: Iterable[Format]) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _separated(tags: Sequence[Format], separator: str | None) -> Format:
    """At least one; exactly one if nothing can stand between them."""
    return {
        "type": "tags_with_separator",
        "tags": list(tags),
        "separator": separator or "",
        "at_least_one": True,
        "stop_after_first": separator is None,
    }


def _any(elements: Iterable[Format]) -> Format:
    return {"type": "or", "elements": list(elements)}
