"""What an answer must match, as callers say it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import RequestError, shown
from engine.values import asks_for_nothing

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """One of these, which the whole output matches; the names are vLLM's.

    json: a JSON schema, as a dict or as text. json_object: True is any JSON object.
    regex: a regular expression in the syntax of Rust's crate regex (no look-around, no
        backreferences; classes such as \\\\d are Unicode's).
    choice: a list of strings, one of which is the output.
    grammar: a context-free grammar, in Lark's notation (as llguidance extends it) or in GBNF.
    structural_tag: ``{"structures": [{"begin": str, "schema": {...}, "end": str}, ...],
        "triggers": [str, ...]}``, as a dict or as text: free text in which each trigger begins one
        of the structures.
    whitespace_pattern: a regular expression for the whitespace between the tokens of JSON.
    disable_any_whitespace: JSON has none there.

    Raises RequestError, naming the field, for a wrong type and unless there is exactly one. Whether
    it can be enforced is known when a request is queued.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        given = [name for name, value in self._kinds().items() if value is not None]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            has = f"got {' and '.join(given)}" if given else "got none"
            raise RequestError(f"structured_outputs must have one of {', '.join(KINDS)}; {has}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(value := getattr(self, name), str | None):
                raise _wrong(name, "a string", value)
        for name in ("json", "structural_tag"):
            if not isinstance(value := getattr(self, name), str | dict | None):
                raise _wrong(name, "a JSON object, or one as a string", value)
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(value := getattr(self, name), bool | None):
                raise _wrong(name, "true or false", value)
        choice = self.choice
        if choice is not None:
            strings = isinstance(choice, Sequence) and not isinstance(choice, str)
            if not strings or not choice or not all(isinstance(one, str) for one in choice):
                raise _wrong("choice", "a list of strings, at least one", choice)
        if self.disable_additional_properties:
            raise RequestError(
                "structured_outputs.disable_additional_properties is not supported: a schema says"
                " additionalProperties: false where it wants none"
            )

    def _kinds(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KINDS}

    @property
    def kind(self) -> str:
        """Which one it is, of ``KINDS``."""
        found = (name for name, value in self._kinds().items() if value not in (None, False))
        return next(found)

    @classmethod
    def of(cls, value: Any) -> "StructuredOutputsParams | None":
        """``value`` if it is one already, or from a mapping of its fields; None of what is empty.

        Raises RequestError, naming the field.
        """
        if isinstance(value, cls) or asks_for_nothing(value):
            return value or None
        if not isinstance(value, Mapping):
            raise RequestError(
                f"structured_outputs must be StructuredOutputsParams, got {shown(value)}"
            )
        known = {field.name for field in fields(cls)}
        for name in value:
            if name not in known:
                raise RequestError(
                    f"structured_outputs has no {shown(name)}; it has {', '.join(sorted(known))}"
                )
        return cls(**{name: inner for name, inner in value.items() if inner is not None})


def _wrong(name: str, allowed: str, value: Any) -> RequestError:
    return RequestError(f"structured_outputs.{name} must be {allowed}, got {shown(value)}")
