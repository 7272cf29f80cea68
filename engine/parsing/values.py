"""Values of arguments that a format writes as bare text, by the tool's JSON schema."""

import ast
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from engine.parsing.source import Malformed, loads

_LITERALS = {"true": True, "false": False, "null": None, "none": None}
_JSON_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict,
    "null": type(None), "string": str,
}  # fmt: skip


class Tools:
    """What the tools of a request take.

    tools: as OpenAI's API has them: {"type": "function", "function": {"name", "parameters"}}.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool.get("function", tool)
            schema = function.get("parameters")
            self._parameters[function["name"]] = schema if isinstance(schema, Mapping) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def value(self, name: str, parameter: str, text: str) -> Any:
        """What ``text`` means as an argument of tool ``name``.

        A string where the schema says nothing but string; else JSON, or what Python writes for
        it, of a type that the schema has; else the text.
        """
        schema = self._parameters.get(name, {})
        properties = schema.get("properties")
        known = properties.get(parameter) if isinstance(properties, Mapping) else None
        types = types_of(known, schema)
        for value in readings(text.strip()):
            if not types or any(_is(value, kind) for kind in types - {"string"}):
                return value
        return text


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 8) -> set[str]:
    """The JSON types that a schema allows; none where it does not say."""
    if not isinstance(schema, Mapping) or depth == 0:
        return set()
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return {kinds}
    if isinstance(kinds, list):
        return {kind for kind in kinds if isinstance(kind, str)}
    if isinstance(schema.get("enum"), list):
        return {kind for one in schema["enum"] for kind in _JSON_TYPES if _is(one, kind)}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        return types_of(target, root, depth - 1)
    for union in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(union), list):
            return set().union(*(types_of(one, root, depth - 1) for one in schema[union]))
    return set()


def readings(text: str) -> list[Any]:
    """The value that a bare text may be: JSON, or what Python writes for it; none if neither."""
    if text.lower() in _LITERALS:
        return [_LITERALS[text.lower()]]
    with contextlib.suppress(Malformed):
        return [loads(text)]
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        value = ast.literal_eval(text)
        if isinstance(value, list | dict):
            return [value]
    return []


def _is(value: Any, kind: str) -> bool:
    wanted = _JSON_TYPES.get(kind, ())
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, wanted)
