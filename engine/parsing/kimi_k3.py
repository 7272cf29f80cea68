"""Kimi K3: elements between control tokens."""

import html
import re
from typing import Any

from engine.parsing.calls import CallFormat, Unfinished
from engine.parsing.parts import Writer
from engine.parsing.source import Malformed, Reading, Source, dumps, loads
from engine.parsing.values import Tools


def _tag(kind: str, name: str) -> str:
    return f"<|{kind}|>{name}<|sep|>"


THINK = (_tag("open", "think"), _tag("close", "think"))
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class ElementCalls(CallFormat):
    """<|open|>call tool="NAME"<|sep|> in an element of tools; arguments are elements that tell
    their type. The element of the response is no call, but is passed over in the same way."""

    openers = (
        _tag("open", "tools"), _tag("open", "response"), _tag("close", "response"),
        _tag("close", "message"),
    )  # fmt: skip
    tags = ("<|open|>", "<|close|>", "<|sep|>")
    ends_reasoning = True
    trims = False
    _CALL = re.compile(r"<\|open\|>call ([^<]{1,200})<\|sep\|>|<\|close\|>tools<\|sep\|>")
    _ARGUMENT = re.compile(r"<\|open\|>argument ([^<]{1,180})<\|sep\|>|<\|close\|>call<\|sep\|>")
    _VALUE = re.compile(r"<\|close\|>argument<\|sep\|>(?=<\|open\|>argument |<\|close\|>call)")

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source) as place:
            opener = yield from source.next_is(*self.openers)
            source.at += len(opener or "")
            if opener != self.openers[0]:
                return
            while True:
                _, mark = yield from source.until(self._CALL)
                if mark[1] is None:
                    return
                name = _attributes(mark[1]).get("tool", "")
                arguments: dict[str, Any] = {}
                while True:
                    _, mark = yield from source.until(self._ARGUMENT)
                    if mark[1] is None:
                        break
                    about = _attributes(mark[1])
                    text, _ = yield from source.until(self._VALUE)
                    is_text = about.get("type", "string") == "string"
                    arguments[about.get("key", "")] = text if is_text else loads(text)
                if not name:
                    raise Malformed
                out.call(name, dumps(arguments))
                place.whole()

    def prefix(self, name: str | None) -> str:
        head = _tag("close", "response") + self.openers[0] + '<|open|>call tool="'
        return head if name is None else f'{head}{name}" index="1"<|sep|>'


def _attributes(text: str) -> dict[str, str]:
    return {key: html.unescape(value) for key, value in _ATTRIBUTE.findall(text)}
