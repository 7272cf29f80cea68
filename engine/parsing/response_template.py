"""A checkpoint's ``response_template``: what transformers is told of its answers (transformers 5,
docs "Chat response parsing"). Regions are opened and closed by strings or regular expressions;
what is in one is text, JSON, tags or Python, and a transform puts it into the message's shape."""

import json
import re
from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.parsing.answers import TaggedAnswer
from engine.parsing.calls import CallFormat, Unfinished, write_calls
from engine.parsing.notation_calls import python_calls
from engine.parsing.parts import Writer
from engine.parsing.source import MARGIN, Malformed, Reading, Source, loads
from engine.parsing.thinking import Thinking
from engine.parsing.values import Tools

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_KINDS = ("json", "xml-inline", "python-call-list")
_NO_END = re.compile(r"(?!)")
_END = re.compile(r"\Z")
_PLACEHOLDER = re.compile(r"\{(\w+(?:\.\w+)*)\}")


def template_answer(template: Any, with_tools: bool) -> TaggedAnswer | None:
    """The format that a response_template describes; None if it has neither calls nor thinking.

    Raises CheckpointError for what is not understood of it.
    """
    try:
        fields = template["fields"]
        thought = next((fields[name] for name in _THOUGHTS if name in fields), None)
        thinking = None
        if thought is not None:
            thinking = Thinking(_strings(thought, "open"), _strings(thought, "close"))
        calls = (
            TemplateCalls(fields["tool_calls"]) if with_tools and "tool_calls" in fields else None
        )
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise CheckpointError(f"response_template is not understood: {error!r}") from None
    return TaggedAnswer(thinking, calls) if thinking or calls else None


def _strings(field: Mapping[str, Any], end: str) -> tuple[str, ...]:
    """The strings that open or close a region; of a pattern, what it begins with."""
    if end in field:
        value = field[end]
        return (value,) if isinstance(value, str) else tuple(value)
    begins = re.sub(r"^(\\s|\\n|\s)[*+?]?", "", field[f"{end}_pattern"])
    found = re.match(r"(?:[^\\^$.|?*+()\[\]{}]|\\[^\w\s])*", begins)
    assert found is not None
    literal, rest = found[0], begins[found.end() :]
    if rest[:1] in ("?", "*", "{"):
        literal = literal[: -2 if literal[-2:-1] == "\\" else -1]
    if not literal or rest.startswith("|"):
        raise ValueError(f"{end}_pattern begins with no certain string")
    return (re.sub(r"\\(.)", r"\1", literal),)


class TemplateCalls(CallFormat):
    """Calls as the field tool_calls of a response_template has them."""

    def __init__(self, field: Mapping[str, Any]) -> None:
        self.openers = _strings(field, "open")
        patterns = [*map(re.escape, self.openers)] if "open" in field else [field["open_pattern"]]
        self._open = re.compile("|".join(patterns), re.DOTALL)
        self._close = _NO_END
        if "close" in field or "close_pattern" in field:
            closers = _strings(field, "close")
            self.tags = closers
            pattern = "|".join(map(re.escape, closers)) if "close" in field else None
            self._close = re.compile(pattern or field["close_pattern"], re.DOTALL)
        self._kind, self._options = field.get("content", "text"), field.get("content_args") or {}
        if self._kind not in _KINDS:
            raise ValueError(f"tool_calls has the content {self._kind!r}; known are {_KINDS}")
        self._transform, self._each = field.get("transform"), bool(field.get("transform_each"))

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source):
            captures = yield from self._opened(source)
            begin = source.at
            while True:
                end = _END if self._close is _NO_END else None
                _, close = yield from source.until(self._close, end)
                found = {**captures, **{k: v for k, v in close.groupdict().items() if v}}
                try:
                    calls = self._calls(source.text[begin : close.start()], found, tools)
                    break
                except (Malformed, KeyError, TypeError, ValueError):
                    if self._kind != "json" or close.end() == close.start():
                        raise Malformed from None  # the end of JSON may stand in a string of it
            write_calls(calls, out)

    def _opened(self, source: Source) -> Reading[dict[str, str]]:
        while True:
            match = self._open.match(source.text, source.at)
            if match is not None and (source.ended or match.end() < len(source.text)):
                source.at = match.end()
                return {key: value for key, value in match.groupdict().items() if value}
            if match is None and len(source.text) - source.at > MARGIN:
                raise Malformed
            yield from source.more()

    def _calls(self, body: str, captures: Mapping[str, Any], tools: Tools) -> list[Any]:
        value = self._content(body)
        if self._transform is None:
            made = value
        elif self._each:
            made = [_transformed(self._transform, {**captures, **item}) for item in value]
        else:
            made = _transformed(self._transform, {**captures, "content": value})
        calls: list[Any] = made if isinstance(made, list) else [made]
        if self._kind == "xml-inline":
            for call in calls:
                function = call.get("function", call)
                name, texts = function["name"], function["arguments"]
                function["arguments"] = {k: tools.value(name, k, v) for k, v in texts.items()}
        return calls

    def _content(self, body: str) -> Any:
        if self._kind == "python-call-list":
            return [{"name": n, "arguments": loads(a)} for n, a in python_calls(body)]
        if self._kind == "xml-inline":
            tags = re.compile(self._options["tag_pattern"], re.DOTALL)
            return {match["key"]: match["value"] for match in tags.finditer(body)}
        strings: list[str] = []
        for begin, end in self._options.get("string_delims", ()):
            between = re.compile(f"{re.escape(begin)}(.*?){re.escape(end)}", re.DOTALL)
            body = between.sub(lambda m: strings.append(m[1]) or f'"\0{len(strings) - 1}"', body)  # type: ignore[func-returns-value]
        if self._options.get("unquoted_keys"):
            body = re.sub(
                r'"(?:\\.|[^"\\])*"|([{,]\s*)(\w+)(\s*:)',
                lambda m: m[0] if m[2] is None else f'{m[1]}"{m[2]}"{m[3]}',
                body,
            )
        for number, text in enumerate(strings):
            body = body.replace(f'"\0{number}"', json.dumps(text))
        return loads(body)

    def prefix(self, name: str | None) -> str | None:
        if name is None:
            return self.openers[0]
        function = self._transform and self._transform.get("function")
        if function == "{content}" and self._kind == "json":
            return f'{self.openers[0]}\n{{"name": "{name}", "arguments":'
        for begun in (f"{self.openers[0]}{name}", f"{self.openers[0]}{name}>"):
            match = self._open.fullmatch(begun)
            if match is not None and match.groupdict().get("name") == name:
                return begun
        return None


def _transformed(shape: Any, scope: Mapping[str, Any]) -> Any:
    """The shape with its placeholders, {name} or {name.key}, filled in."""
    if isinstance(shape, dict):
        return {key: _transformed(value, scope) for key, value in shape.items()}
    if isinstance(shape, list):
        return [_transformed(value, scope) for value in shape]
    match = _PLACEHOLDER.fullmatch(shape) if isinstance(shape, str) else None
    if match is None:
        return shape
    value: Any = scope
    for key in match[1].split("."):
        value = value[key]
    return value
