"""A grammar as a value that travels with a request, and as the text that llguidance compiles."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError, shown
from engine.json_schema import enforceable
from engine.structured_outputs import StructuredOutputsParams

MOST_CHARACTERS = 1 << 18
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,40}"  # as JSON is written; what is unbounded may never end
_ESCAPES = 'nrbtf\\"'  # in JSON strings; see engine.json_schema
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
# Attributes of Lark rules that would have no effect here, or need tokens to be taken back.
_ATTRIBUTES = re.compile(r"^\s*[?!]?[\w-]+\[[^\]\n]*\b(temperature|max_tokens|stop)\s*=", re.M)


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must match.

    kind: of ``structured_outputs.KINDS``. text: it, as JSON unless it is a regex or a grammar;
    only ``structural_tag`` needs the tokenizer's special tokens to be made a grammar of llguidance.
    whitespace: a regular expression for what may stand between the tokens of JSON; "" is nothing.
    """

    kind: str
    text: str
    whitespace: str = WHITESPACE

    @classmethod
    def of(cls, params: StructuredOutputsParams) -> "Grammar":
        """Raises RequestError, naming the field, for what is no JSON or too large, and for a schema
        that would not be enforced whole."""
        kind = params.kind
        whitespace = WHITESPACE if params.whitespace_pattern is None else params.whitespace_pattern
        if params.disable_any_whitespace:
            whitespace = ""
        try:
            text = _text(kind, params)
            text.encode()
        except RequestError as error:
            raise RequestError(f"structured_outputs.{kind}: {error}") from None
        except (ValueError, TypeError, RecursionError) as error:
            what = "too deep" if isinstance(error, RecursionError) else str(error)
            raise RequestError(f"structured_outputs.{kind} cannot be read: {what}") from None
        if len(text) + len(whitespace) > MOST_CHARACTERS:
            raise RequestError(
                f"structured_outputs.{kind} has {len(text)} characters; at most {MOST_CHARACTERS}"
            )
        return cls(kind, text, whitespace)

    def lark(self, special: Mapping[str, int]) -> str:
        """The grammar in Lark's notation, as llguidance extends it.

        special: tokens that are no text, with their ids. Raises RequestError.
        """
        if self.kind == "regex":
            return _rule(self.text)
        if self.kind == "choice":
            return "start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, json.loads(self.text)))
        if self.kind == "grammar":
            return _as_lark(self.text)
        if self.kind == "structural_tag":
            return self._tags(json.loads(self.text), special)
        return f"start: {self._json(json.loads(self.text))}"

    def _json(self, schema: Any) -> str:
        """A schema that was found enforceable, as a part of a rule."""
        options = {"json_allowed_escapes": _ESCAPES, "whitespace_flexible": bool(self.whitespace)}
        if self.whitespace:
            options["whitespace_pattern"] = self.whitespace
        return f"%json {json.dumps({**({} if schema is True else schema), 'x-guidance': options})}"

    def _tags(self, tag: Any, special: Mapping[str, int]) -> str:
        """Free text in which a trigger forces what it begins: a lazy lexeme ends with the first
        trigger, so that no free text has one (llguidance's documentation of tool calls)."""
        rules, names = [], []
        for number, one in enumerate(tag["structures"]):
            trigger = next(t for t in tag["triggers"] if one["begin"].startswith(t))
            name = f"tag_{number}"
            names.append(name)
            body = [
                *_parts(one["begin"][len(trigger) :], special),
                self._json(one["schema"]),
                *_parts(one["end"], special),
            ]
            if trigger in special:
                head = f"TEXT <[{special[trigger]}]>"
            else:
                head = f"{name}_head"
                rules.append(f"{head}[lazy]: TEXT {_quoted(trigger)}")
            rules.append(f"{name}: {head} {' '.join(body)}")
        start = f"start: ({' | '.join(names)})* tail\ntail: TEXT\nTEXT: /(?s:.*)/"
        return "\n".join([start, *rules])


def _text(kind: str, params: StructuredOutputsParams) -> str:
    if kind == "json_object":
        return '{"type": "object"}'
    if kind == "regex":
        assert params.regex is not None
        return params.regex
    if kind == "grammar":
        assert params.grammar is not None
        if found := _ATTRIBUTES.search(params.grammar[:MOST_CHARACTERS]):
            raise RequestError(f"the attribute {found[1]} of a rule is not supported")
        return params.grammar
    if kind == "choice":
        assert params.choice is not None
        return json.dumps(list(params.choice), ensure_ascii=False)
    given = params.json if kind == "json" else params.structural_tag
    if isinstance(given, str):
        if len(given) > MOST_CHARACTERS:
            return given  # refused for its length
        given = json.loads(given)
    checked = enforceable(given) if kind == "json" else _checked_tags(given)
    return json.dumps(checked, ensure_ascii=False, allow_nan=False)


def _as_lark(grammar: str) -> str:
    if not _GBNF.search(grammar):
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # it raises anything
        raise RequestError(f"no GBNF: {' '.join(str(error).split())[:300]}") from None


def _checked_tags(tag: Any) -> dict[str, Any]:
    """Raises RequestError, naming the field."""
    if not isinstance(tag, dict) or "format" in tag:
        raise RequestError("it must have structures and triggers (a format is not supported)")
    structures: Any = tag.get("structures")
    triggers: Any = tag.get("triggers")
    if not _are_texts(triggers):
        raise RequestError("triggers must be a list of strings, none of them empty")
    if not isinstance(structures, list) or not structures:
        raise RequestError("structures must be a list, at least of one")
    clean = []
    for one in structures:
        if not isinstance(one, dict) or not {"begin", "schema", "end"} >= one.keys():
            raise RequestError("a structure must have begin, schema and end, and no more")
        begin, end = one.get("begin"), one.get("end", "")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise RequestError("begin and end of a structure must be strings")
        if not any(begin.startswith(trigger) for trigger in triggers):
            raise RequestError(f"begin must start with one of the triggers, got {shown(begin)}")
        clean.append({"begin": begin, "schema": enforceable(one.get("schema", {})), "end": end})
    return {"structures": clean, "triggers": triggers}


def _are_texts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(one, str) and one for one in values)
    )


def _rule(regex: str) -> str:
    return "start: REGEX\nREGEX: /" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", regex) + "/"


def _quoted(text: str) -> str:
    """A literal of Lark's: JSON's way of writing strings, and no control characters."""
    written = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", written)


def _parts(text: str, special: Mapping[str, int]) -> Iterator[str]:
    """``text`` as literals and special tokens."""
    names = sorted(special, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    for piece in pieces:
        if piece:
            yield f"<[{special[piece]}]>" if piece in special else _quoted(piece)
