"""Structural tags: texts that are partly free and partly of a form, as a grammar.

``{"structures": [...], "triggers": [...]}``, or ``{"format": {...}}`` with XGrammar's formats, one
made of the other (docs of github.com/mlc-ai/xgrammar, "Structural Tag"):

- ``const_string``: ``value``; ``json_schema``: ``json_schema``; ``regex``: ``pattern``;
  ``grammar``: ``grammar``; ``any_text``: ``excludes``, strings that the text has not.
- ``sequence`` and ``or``: ``elements``.
- ``tag``: ``begin``, ``content``, ``end``.
- ``tags_with_separator``: ``tags``, ``separator``; ``triggered_tags``: ``tags``, ``triggers``, text
  in which each trigger begins a tag. Both take ``at_least_one`` and ``stop_after_first``.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from engine.errors import RequestError, shown
from engine.json_schema import MOST_DEPTH, enforceable
from engine.lark import as_lark, check_attributes, quoted, regex_terminal
from engine.structured_outputs import StructuredOutputsParams

Format = dict[str, Any]
_FIELDS: Mapping[str, Collection[str]] = {
    "const_string": ("value",), "json_schema": ("json_schema",), "regex": ("pattern",),
    "grammar": ("grammar",), "any_text": ("excludes",),
    "sequence": ("elements",), "or": ("elements",), "tag": ("begin", "content", "end"),
    "tags_with_separator": ("tags", "separator"), "triggered_tags": ("tags", "triggers"),
}  # fmt: skip
_FLAGS = ("at_least_one", "stop_after_first")
_STRINGS = ("value", "pattern", "grammar", "begin", "end", "separator")


def checked(tag: Any) -> Format:
    """The format that a structural tag is, with schemas that were found enforceable.

    Raises RequestError, naming the field.
    """
    if isinstance(tag, dict) and "format" in tag:
        if extra := tag.keys() - {"format", "type"}:
            raise RequestError(
                f"beside format it must have nothing, got {', '.join(sorted(extra))}"
            )
        return _checked(tag["format"], "format", True, 0)
    if not isinstance(tag, dict) or not {"structures", "triggers"} >= tag.keys():
        raise RequestError("it must have structures and triggers, or a format")
    structures = tag.get("structures")
    if not isinstance(structures, list) or not structures:
        raise RequestError("structures must be a list, at least of one")
    tags = []
    for one in structures:
        if not isinstance(one, dict) or not {"begin", "schema", "end"} >= one.keys():
            raise RequestError("a structure must have begin, schema and end, and no more")
        content = {"type": "json_schema", "json_schema": one.get("schema", {})}
        tags.append({"begin": one.get("begin"), "content": content, "end": one.get("end", "")})
    form = {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}
    return _checked(form, "", True, 0)


def _checked(form: Any, where: str, last: bool, depth: int) -> Format:
    """``last``: whether nothing follows, so that it may end in free text."""
    kind = form.get("type") if isinstance(form, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise RequestError(f"{where} must have a type of {', '.join(_FIELDS)}, got {shown(form)}")
    if depth > MOST_DEPTH:
        raise RequestError(f"a format must not be deeper than {MOST_DEPTH} levels")
    flags = _FLAGS if "tags" in _FIELDS[kind] else ()
    if extra := form.keys() - {"type", *_FIELDS[kind], *flags}:
        raise RequestError(f"{where}: {kind} has no {shown(min(extra))}")
    clean: Format = {"type": kind} | {flag: _flag(form, flag, where) for flag in flags}
    for name in _FIELDS[kind]:
        at, value = f"{where}.{name}".lstrip("."), form.get(name)
        if name in _STRINGS:
            if not isinstance(value, str):
                raise RequestError(f"{at} must be a string, got {shown(value)}")
            clean[name] = value
            if name == "grammar":
                check_attributes(value)
        elif name == "json_schema":
            clean[name] = enforceable(value)
        elif name == "content":
            free = last
            if form.get("end"):  # up to there any text may stand
                free = isinstance(value, dict) and value.get("type") == "any_text"
            clean[name] = _checked(value, at, free, depth + 1)
        elif name == "triggers":
            clean[name] = _texts(value, at)
        elif name == "excludes":
            clean[name] = _texts(value, at) if value else []
        else:
            clean[name] = _parts(kind, value, at, last, depth)
    if kind in ("any_text", "triggered_tags") and not last:
        raise RequestError(f"{where}: {kind} must be what is last, or stand in a tag with an end")
    for one in clean["tags"] if kind == "triggered_tags" else ():
        if not one["begin"].startswith(tuple(clean["triggers"])):
            raise RequestError(
                f"begin must start with one of the triggers, got {shown(one['begin'])}"
            )
    return clean


def _flag(form: Format, name: str, where: str) -> bool:
    value = form.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{where}.{name} must be true or false, got {shown(value)}")
    return value


def _texts(value: Any, at: str) -> list[str]:
    texts = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
    if not texts or not value:
        raise RequestError(f"{at} must be a list of strings, none of them empty")
    return list(value)


def _parts(kind: str, value: Any, at: str, last: bool, depth: int) -> list[Format]:
    """Those of elements or tags."""
    if not isinstance(value, list) or not value:
        raise RequestError(f"{at} must be a list, at least of one")
    found = []
    for number, one in enumerate(value):
        if at.endswith("tags"):
            one = {"type": "tag", **one} if isinstance(one, dict) else one
        is_last = last and (kind == "or" or (kind == "sequence" and number == len(value) - 1))
        found.append(_checked(one, f"{at}[{number}]", is_last, depth + 1))
        if at.endswith("tags") and found[-1]["type"] != "tag":
            raise RequestError(f"{at}[{number}] must be a tag")
    return found


def format_of(outputs: StructuredOutputsParams) -> Format:
    """What an output must match, as a format. Raises RequestError and ValueError."""
    kind = outputs.kind
    if kind == "json_object":
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if kind == "regex":
        return {"type": "regex", "pattern": outputs.regex}
    if kind == "grammar":
        return {"type": "grammar", "grammar": outputs.grammar}
    if outputs.choice is not None:
        choices = [{"type": "const_string", "value": one} for one in outputs.choice]
        return {"type": "or", "elements": choices}
    given = outputs.json if kind == "json" else outputs.structural_tag
    value = json.loads(given) if isinstance(given, str) else given
    return {"type": "json_schema", "json_schema": value} if kind == "json" else checked(value)


class Rules:
    """A format as rules of Lark.

    special: tokens that are no text, with their ids. json: a schema as a part of a rule. grammars:
    the format's own ones by the names under which rules have them, once they are made.
    """

    def __init__(self, special: Mapping[str, int], json: Callable[[Any], str]) -> None:
        self.grammars: dict[str, str] = {}
        self._special, self._json = special, json
        self._rules: dict[tuple[str, str, str], str] = {}  # names, by prefix, mark and text
        longest_first = sorted(special, key=len, reverse=True)
        # (?!) is found nowhere: without special tokens a text is one piece.
        self._marks = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def start(self, form: Format) -> str:
        """The grammar whose start the format is. Raises RequestError."""
        start = f"start: {self._of(form)}"
        rules = [f"{name}{mark}: {text}" for (_, mark, text), name in self._rules.items()]
        return "\n".join([start, "TEXT: /(?s:.*)/", *rules])

    def _named(self, prefix: str, text: str, mark: str = "") -> str:
        """The name of a rule, which is made if there is none such."""
        return self._rules.setdefault((prefix, mark, text), f"{prefix}{len(self._rules)}")

    def _of(self, form: Format) -> str:
        match form["type"]:
            case "const_string":
                return self._literal(form["value"])
            case "json_schema":
                return self._named("json", self._json(form["json_schema"]))
            case "regex":
                return self._named("REGEX", regex_terminal(form["pattern"]))
            case "grammar":
                name = f"grammar{len(self.grammars)}"
                self.grammars[name] = as_lark(form["grammar"])
                return f"@{name}"
            case "any_text":
                return f"{self._others(form['excludes'])} {self._text(form['excludes'])}"
            case "sequence":
                return " ".join(map(self._of, form["elements"]))
            case "or":
                return _any(map(self._of, form["elements"]))
            case "tag":
                return self._tag(form, form["begin"])
            case "tags_with_separator":
                return self._separated(form)
        return self._triggered(form)

    def _literal(self, text: str) -> str:
        return " ".join(self._pieces(text)) or '""'

    def _pieces(self, text: str) -> Iterator[str]:
        """``text`` as literals and special tokens."""
        for piece in self._split(text):
            yield f"<[{self._special[piece]}]>" if piece in self._special else quoted(piece)

    def _split(self, text: str) -> list[str]:
        return [piece for piece in self._marks.split(text) if piece]

    def _tag(self, form: Format, begin: str) -> str:
        """``begin``: what is still to come of its beginning."""
        content, end = form["content"], form["end"]
        parts = [self._literal(begin)] if begin else []
        if content["type"] == "any_text" and end:
            parts.append(self._until(end, content["excludes"]))
        else:
            parts += [self._of(content), self._literal(end)]
        return " ".join(parts)

    def _separated(self, form: Format) -> str:
        one = _any(map(self._of, form["tags"]))
        if not form["stop_after_first"]:
            one = f"{one} ({self._literal(form['separator'])} {one})*"
        return one if form["at_least_one"] else f"({one})?"

    def _triggered(self, form: Format) -> str:
        triggers = form["triggers"]
        marks = {trigger: self._mark(trigger) for trigger in triggers}
        free = self._others(marks.values())
        tags = []
        for trigger, mark in marks.items():
            mine = [one for one in form["tags"] if _trigger_of(one, triggers) == trigger]
            if mine:
                rest = (self._tag(one, one["begin"].partition(mark)[2]) for one in mine)
                tags.append(f"{self._first(mark)} {_any(rest)}")
        one = _any(tags)
        more = "" if form["stop_after_first"] else f"({free} {one})* {free} TEXT"
        if form["at_least_one"]:
            return f"{free} {one} {more}"
        return more or f"{free} ({one} | TEXT)"

    def _until(self, end: str, excludes: Sequence[str]) -> str:
        """Any text without ``excludes`` up to ``end``, and that."""
        mark = self._mark(end)
        rest = end.partition(mark)[2]
        free = self._others((mark, *excludes))
        return f"{free} {self._first(mark, excludes)} {self._literal(rest) if rest else ''}"

    def _mark(self, text: str) -> str:
        """What of ``text`` ends free text: its first special token, which no text has, or all."""
        return next((piece for piece in self._split(text) if piece in self._special), text)

    def _first(self, mark: str, excludes: Sequence[str] = ()) -> str:
        """Text up to a mark, and that: a lazy lexeme ends with the first one, so that no free text
        has one (llguidance's documentation of tool calls)."""
        if mark in self._special:
            return f"{self._text(excludes)} <[{self._special[mark]}]>"
        return self._named("until", f"{self._text(excludes)} {quoted(mark)}", "[lazy]")

    def _text(self, excludes: Sequence[str]) -> str:
        """The terminal of text without ``excludes``; special tokens are in none."""
        parts = [f"~(TEXT {quoted(one)} TEXT)" for one in excludes if one not in self._special]
        return self._named("FREE", " & ".join(["TEXT", *parts])) if parts else "TEXT"

    def _others(self, marks: Iterable[str]) -> str:
        """Text that ends with special tokens other than ``marks``, or nothing."""
        ids = {self._special[name] for name in self._special.keys() - set(marks)}
        return f"(TEXT <[{','.join(map(str, sorted(ids)))}]>)*" if ids else ""


def _any(parts: Iterable[str]) -> str:
    return f"({' | '.join(parts)})"


def _trigger_of(tag: Format, triggers: Iterable[str]) -> str:
    return next(trigger for trigger in triggers if tag["begin"].startswith(trigger))
