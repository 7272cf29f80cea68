"""A grammar as a value that travels with a request, and as the text that llguidance compiles."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from engine.json_schema import enforceable
from engine.lark import MOST_CHARACTERS, as_lark, check_attributes, quoted, regex_terminal
from engine.structural_tag import Rules, checked
from engine.structured_outputs import StructuredOutputsParams

WHITESPACE = r"\x20|\r?\n[\x20\t]{0,40}"  # as JSON is written; what is unbounded may never end
_ESCAPES = 'nrbtf\\"'  # in JSON strings; see engine.json_schema


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

    def larks(self, special: Mapping[str, int]) -> dict[str, str]:
        """The grammar in Lark's notation, as llguidance extends it: the first one, and those that
        it has by name.

        special: tokens that are no text, with their ids. Raises RequestError.
        """
        if self.kind == "structural_tag":
            rules = Rules(special, self._json)
            start = rules.start(json.loads(self.text))
            return {"": start, **rules.grammars}
        return {"": self._lark()}

    def _lark(self) -> str:
        if self.kind == "regex":
            return f"start: REGEX\nREGEX: {regex_terminal(self.text)}"
        if self.kind == "choice":
            return "start: CHOICE\nCHOICE: " + " | ".join(map(quoted, json.loads(self.text)))
        if self.kind == "grammar":
            return as_lark(self.text)
        return f"start: {self._json(json.loads(self.text))}"

    def _json(self, schema: Any) -> str:
        """A schema that was found enforceable, as a part of a rule."""
        options = {"json_allowed_escapes": _ESCAPES, "whitespace_flexible": bool(self.whitespace)}
        if self.whitespace:
            options["whitespace_pattern"] = self.whitespace
        return f"%json {json.dumps({**({} if schema is True else schema), 'x-guidance': options})}"


def _text(kind: str, params: StructuredOutputsParams) -> str:
    if kind == "json_object":
        return '{"type": "object"}'
    if kind == "regex":
        assert params.regex is not None
        return params.regex
    if kind == "grammar":
        assert params.grammar is not None
        check_attributes(params.grammar)
        return params.grammar
    if kind == "choice":
        assert params.choice is not None
        return json.dumps(list(params.choice), ensure_ascii=False)
    given = params.json if kind == "json" else params.structural_tag
    if isinstance(given, str):
        if len(given) > MOST_CHARACTERS:
            return given  # refused for its length
        given = json.loads(given)
    clean = enforceable(given) if kind == "json" else checked(given)
    return json.dumps(clean, ensure_ascii=False, allow_nan=False)
