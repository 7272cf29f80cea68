"""Calls in notations of their own: Gemma's, and Python's."""

import ast
import contextlib
import re
from typing import Any

from engine.parsing.calls import CallFormat, Unfinished
from engine.parsing.parts import Writer
from engine.parsing.source import PYTHON, Brackets, Ended, Malformed, Reading, Source, dumps
from engine.parsing.values import Tools, readings


class NotationCalls(CallFormat):
    """Gemma 4 and FunctionGemma: call:NAME{KEY:VALUE,...} between marks. Strings stand between
    marks of their own and have no escapes, keys are bare."""

    trims = False
    _HEAD = re.compile(r"\s*call:\s*([\w./:-]{1,200})\s*")

    def __init__(self, opener: str, closer: str, quote: str) -> None:
        self.openers = (opener,)
        self.tags = (closer, quote)
        self._closer, self._quote = closer, quote
        self._brackets = Brackets([quote], escapes=False)
        mark = f"(?:{re.escape(quote)})?"
        self._key = re.compile(rf"\s*{mark}([^:{{}}\[\]]*?){mark}:")

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source):
            source.at += len(self.openers[0])
            head, _ = yield from source.until(re.compile(rf"(?=\{{|{re.escape(self._closer)})"))
            name = self._HEAD.fullmatch(head)
            if name is None or source.text[source.at] != "{":
                raise Malformed
            arguments = self._arguments((yield from source.bracketed(self._brackets)))
            yield from source.spaces()
            yield from source.expect(self._closer)
            out.call(name[1], arguments)

    def _arguments(self, text: str) -> str:
        try:
            return dumps(self._value(text, 0)[0])
        except (IndexError, ValueError, RecursionError):
            raise Malformed from None

    def _value(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins there, and where it ends."""
        at = _past_spaces(text, at)
        if text.startswith(self._quote, at):
            begin = at + len(self._quote)
            end = text.index(self._quote, begin)
            return text[begin:end], end + len(self._quote)
        if text[at] == "{":
            return self._items(text, at + 1, "}")
        if text[at] == "[":
            return self._items(text, at + 1, "]")
        bare = re.compile(r"[^,\]}]*").match(text, at)
        assert bare is not None
        word = bare[0].strip()
        return next(iter(readings(word)), word), bare.end()

    def _items(self, text: str, at: int, closer: str) -> tuple[Any, int]:
        found: dict[str, Any] = {}
        while text[at := _past_spaces(text, at)] != closer:
            key = str(len(found))
            if closer == "}":
                match = self._key.match(text, at)
                if match is None:
                    raise Malformed
                key, at = match[1].strip(), match.end()
            found[key], at = self._value(text, at)
            at = _past_spaces(text, at)
            if text[at] == ",":
                at += 1
            elif text[at] != closer:
                raise Malformed
        return found if closer == "}" else list(found.values()), at + 1

    def prefix(self, name: str | None) -> str:
        return f"{self.openers[0]}call:" + ("" if name is None else name + "{")


class PythonCalls(CallFormat):
    """Llama 4, Llama 3.2 and Olmo 3: [f(a=1), g()], which is all of the answer, or stands between
    marks. Only of tools that were offered: any other list is an answer.

    lines: whether calls stand on lines of their own, without a list around them.
    """

    trims = False

    def __init__(self, opener: str, closer: str, lines: bool = False) -> None:
        self.openers = (opener,) if lines else (opener, "[")
        self.tags = (closer,)
        self._opener, self._closer, self._lines = opener, closer, lines
        self.bare_openers = self.openers[1:]

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source):
            marked = yield from source.skip(self._opener)
            if self._lines:
                end = re.compile(re.escape(self._closer))
                text, _ = yield from source.until(end)
                lines = [line for line in text.splitlines() if line.strip()]
                _write(f"[{','.join(lines)}]", out, tools)
                return
            yield from source.spaces()
            if (yield from source.next_is("[")) is None:
                raise Malformed
            yield from self._check_name(source, tools)
            text = yield from source.bracketed(PYTHON)
            if not marked:
                yield from self._nothing_follows(source)
            _write(text, out, tools)
            yield from source.close(self._closer)

    def _check_name(self, source: Source, tools: Tools) -> Reading[None]:
        """Another list is shown as soon as it is seen to be none of calls."""
        head = re.compile(r"\[\s*([\w.-]{1,200})(\(?)")
        while True:
            match = head.match(source.text, source.at)
            if match is not None and match.end() < len(source.text):
                if not match[2] or match[1] not in tools:
                    raise Malformed
                return
            if match is None and source.text[source.at + 1 :].strip():
                raise Malformed
            yield from source.more()

    def _nothing_follows(self, source: Source) -> Reading[None]:
        begin = source.at
        with contextlib.suppress(Ended):
            yield from source.spaces()
            if (yield from source.next_is(self._closer)) is None:
                raise Malformed
        source.at = begin

    def prefix(self, name: str | None) -> str:
        head = self._opener if self._lines else "["
        return head if name is None else f"{head}{name}("


def _write(text: str, out: Writer, tools: Tools) -> None:
    calls = python_calls(text)
    if not calls or any(name not in tools for name, _ in calls):
        raise Malformed
    for name, arguments in calls:
        out.call(name, arguments)


def python_calls(text: str) -> list[tuple[str, str]]:
    """The names and arguments, as JSON, of calls in a Python list: [f(a=1), g()].

    Raises Malformed if it is no such list.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            raise Malformed
        return [_call(node) for node in tree.elts]
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Malformed from None


def _call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args or any(w.arg is None for w in node.keywords):
        raise Malformed
    values = {str(word.arg): _literal(word.value) for word in node.keywords}
    return ast.unparse(node.func), dumps(values)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    return ast.literal_eval(node)


def _past_spaces(text: str, at: int) -> int:
    while text[at].isspace():
        at += 1
    return at
