"""What llguidance would take from a JSON schema and not enforce is refused here, by name.

llguidance refuses most of what it cannot do itself. What is left: keys are not kept unique, strings
are written in one way only (below), ``x-guidance`` can switch its own checks off, and keywords that
only old drafts have mean nothing to it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from engine.errors import RequestError, shown

MOST_DEPTH = 128
_DATA = ("const", "enum", "default", "example", "examples", "$comment", "title", "description")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_UNHEEDED = ("x-guidance", "extends", "disallow", "divisibleBy")
# Written \u001f, and \u escapes are not allowed: else "\u0061" would be another key than "a".
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")


def enforceable(schema: Any) -> Any:
    """``schema``, without keywords that ask for nothing, if nothing of it would be lost.

    Raises RequestError, naming the keyword.
    """
    if not isinstance(schema, bool | Mapping):
        raise RequestError(f"a JSON schema must be an object or true, got {shown(schema)}")
    if schema is False:
        raise RequestError("the JSON schema false allows nothing")
    return _checked(schema, 0)


def _checked(schema: Any, depth: int) -> Any:
    if depth > MOST_DEPTH:
        raise RequestError(f"a JSON schema must not be deeper than {MOST_DEPTH} levels")
    if isinstance(schema, list):
        return [_checked(one, depth + 1) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    clean: dict[str, Any] = {}
    for keyword, value in schema.items():
        if not isinstance(keyword, str):
            raise RequestError(f"a JSON schema's keywords must be strings, got {shown(keyword)}")
        if keyword in _UNHEEDED:
            raise RequestError(f"{keyword} is not supported in a JSON schema")
        if keyword == "uniqueItems" and value is False:
            continue
        if keyword in ("const", "enum", "required"):
            _check_writable(keyword, value)
        if keyword in _BY_NAME and isinstance(value, Mapping):
            if keyword == "properties":
                _check_writable(keyword, list(value))
            clean[keyword] = {name: _checked(one, depth + 1) for name, one in value.items()}
        else:
            clean[keyword] = value if keyword in _DATA else _checked(value, depth + 1)
    _check_min_properties(schema)
    return clean


def _check_min_properties(schema: Mapping[str, Any]) -> None:
    least, required = schema.get("minProperties"), schema.get("required", [])
    if not isinstance(least, int | float) or not isinstance(required, list):
        return  # llguidance says what is wrong
    sure = len({name for name in required if isinstance(name, str)}) + 1
    if least > sure:
        raise RequestError(
            f"minProperties ({least}) cannot be enforced beyond one more than the required"
            " properties: the keys of others may repeat"
        )


def _check_writable(keyword: str, value: Any) -> None:
    for text in _strings(value, 0):
        if _UNWRITABLE.search(text):
            raise RequestError(f"{keyword} has {shown(text)}: JSON could write it only as \\u00xx")


def _strings(value: Any, depth: int) -> Iterator[str]:
    if depth > MOST_DEPTH:
        raise RequestError(f"a JSON schema must not be deeper than {MOST_DEPTH} levels")
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one, depth + 1)
    elif isinstance(value, Mapping):
        yield from (name for name in value if isinstance(name, str))
        for one in value.values():
            yield from _strings(one, depth + 1)
