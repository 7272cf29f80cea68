"""Calls whose arguments are JSON."""

import re
from abc import abstractmethod

from engine.parsing.calls import CallFormat, Unfinished, arguments_of, write_call, write_calls
from engine.parsing.parts import Writer
from engine.parsing.source import Malformed, Reading, Source, loads
from engine.parsing.structure import CallLayout
from engine.parsing.values import Tools


class ObjectCalls(CallFormat):
    """A call, or a list of calls, as JSON between marks: Hermes, Qwen, Granite, Phi-4 and others.

    pairs: opener to what closes it, which may be missing. key: of the arguments. is_list: whether
    the JSON is a list.
    """

    def __init__(
        self, pairs: dict[str, tuple[str, ...]], key: str = "arguments", is_list: bool = False,
        name: str = "name",
    ) -> None:  # fmt: skip
        self.openers = tuple(pairs)
        self.tags = tuple({tag for closers in pairs.values() for tag in closers})
        self._pairs = pairs
        self.layouts = tuple(
            self._layout(opener, closers[0] if closers else "", key, name, is_list)
            for opener, closers in pairs.items()
        )

    @staticmethod
    def _layout(opener: str, closer: str, key: str, name: str, is_list: bool) -> CallLayout:
        line = "\n" if opener.startswith("<tool_call>") else ""
        begin, end = opener + line + "[" * is_list, "]" * is_list + line + closer
        head = f'{{"{name}": "{{name}}", "{key}": '
        between, apart = ", " if is_list else None, "\n" if closer else None
        return CallLayout(opener, begin, head, "}", end, between, apart)

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source) as place:
            opener = yield from source.next_is(*self.openers)
            assert opener is not None
            source.at += len(opener)
            yield from source.spaces()
            while True:
                write_calls(loads((yield from source.json())), out)
                place.whole()
                if (yield from source.close(*self._pairs[opener])):
                    return
                if not (yield from source.goes_on("{")):
                    return


class BareObjectCalls(CallFormat):
    """Llama 3: JSON objects with name and parameters, which are all of the answer, or follow
    <|python_tag|>; several with ; between them. Only of tools that were offered: any other JSON is
    an answer."""

    openers = ("<|python_tag|>", "{")
    bare_openers = ("{",)
    trims = False
    layouts = (CallLayout("", "", '{"name": "{name}", "parameters": ', "}", between="; "),)
    _KEYS = re.compile(r'\{\s*"(?:name|type|function|parameters|arguments|id)"')
    _FIRST_KEY = re.compile(r'\{\s*"[^"]{0,64}"')

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source) as place:
            yield from source.skip("<|python_tag|>")
            while True:
                yield from source.spaces()
                if (yield from source.next_is("{")) is None:
                    raise Malformed
                yield from self._check_key(source)
                value = loads((yield from source.json()))
                if not isinstance(value, dict) or str(value.get("name")) not in tools:
                    raise Malformed
                if not {"arguments", "parameters"} & value.keys():
                    raise Malformed
                write_call(value, out)
                place.whole()
                if not (yield from source.close(";", "<|python_tag|>")):
                    return

    def _check_key(self, source: Source) -> Reading[None]:
        """Other JSON is shown as soon as its first key is there."""
        while not self._KEYS.match(source.text, source.at):
            if self._FIRST_KEY.match(source.text, source.at) or len(source.text) > 4096:
                raise Malformed
            yield from source.more()


class MistralCalls(CallFormat):
    """[TOOL_CALLS], then a list of objects (tokenizers up to v7), or a name and [ARGS] or { (v11
    and later), with [CALL_ID] between them in some."""

    openers = ("[TOOL_CALLS]",)
    tags = ("[ARGS]", "[CALL_ID]")
    short_ids = True
    _NAME = re.compile(r"\[CALL_ID\]|\[ARGS\]|\s*(?=\{)")
    _ID = re.compile(r"\[ARGS\]")

    def __init__(self, is_list: bool = False) -> None:
        mark = self.openers[0]
        if is_list:
            head = '{"name": "{name}", "arguments": '
            self.layouts = (CallLayout(mark, f"{mark} [", head, "}", "]", ", "),)
        else:
            self.layouts = (CallLayout(mark, mark, "{name}[ARGS]", "", apart=""),)

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source):
            source.at += len(self.openers[0])
            yield from source.spaces()
            if (yield from source.next_is("[")):
                write_calls(loads((yield from source.json())), out)
                return
            name, mark = yield from source.until(self._NAME)
            id = None
            if mark[0] == "[CALL_ID]":
                id, _ = yield from source.until(self._ID)
            if not re.fullmatch(r"[\w./:-]+", name.strip()):
                raise Malformed
            yield from source.spaces()
            arguments = arguments_of((yield from source.json()))
            out.call(name.strip(), arguments, id and id.strip())


class SectionCalls(CallFormat):
    """Calls in a section, each between marks: DeepSeek V3, R1 and V3.1, and Kimi K2."""

    def __init__(
        self, section: tuple[str, str], call: tuple[str, str], sep: str, ends_reasoning: bool,
        named: str, end: str = "",
    ) -> None:  # fmt: skip
        """``named``: how a call goes on after its mark; ``end``: what stands before its end."""
        self.openers = (section[0],)
        self.tags = (section[1], *call, sep)
        self._end, self._sep = section[1], sep
        self._begin_call, self._end_call = call
        self._next = re.compile(f"{re.escape(call[0])}|{re.escape(section[1])}")
        self._head = re.compile(re.escape(sep))
        self.ends_reasoning = ends_reasoning
        head, tail = call[0] + named, end + call[1]
        self.layouts = (CallLayout(section[0], section[0], head, tail, section[1], ""),)

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source) as place:
            found = False
            source.at += len(self.openers[0])
            while True:
                noise, mark = yield from source.until(self._next)
                if mark[0] == self._end:
                    if noise.strip() and not found:
                        raise Malformed
                    return
                head, _ = yield from source.until(self._head)
                yield from self._call(head.strip(), source, out)
                found = True
                yield from source.close(self._end_call)
                place.whole()

    @abstractmethod
    def _call(self, head: str, source: Source, out: Writer) -> Reading[None]:
        """Read the call that ``head`` begins, up to its end mark."""


class DeepSeekCalls(SectionCalls):
    """DeepSeek V3 and R1: a type, then a name and JSON in a block of code. V3.1: name and JSON."""

    def __init__(self, code: bool) -> None:
        super().__init__(
            ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
            "<｜tool▁sep｜>",
            ends_reasoning=False,
            named="function<｜tool▁sep｜>{name}\n```json\n" if code else "{name}<｜tool▁sep｜>",
            end="\n```" if code else "",
        )
        self.trims = code

    _CODE = re.compile(r"\n```json\s{0,8}(?=\{)")

    def _call(self, head: str, source: Source, out: Writer) -> Reading[None]:
        yield from source.spaces()
        name = head
        in_code = head == "function" and not (yield from source.next_is("{"))
        if in_code:
            name, _ = yield from source.until(self._CODE)
        arguments = arguments_of((yield from source.json()))
        if in_code:
            yield from source.close("```")
        out.call(name.strip(), arguments)


class KimiCalls(SectionCalls):
    """Kimi K2: the call's id, functions.NAME:NUMBER, has its name."""

    def __init__(self) -> None:
        super().__init__(
            ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            ("<|tool_call_begin|>", "<|tool_call_end|>"),
            "<|tool_call_argument_begin|>",
            ends_reasoning=True,
            named="functions.{name}:{number}<|tool_call_argument_begin|>",
        )
        self.trims = False

    def _call(self, head: str, source: Source, out: Writer) -> Reading[None]:
        name = head.removeprefix("functions.").rpartition(":")[0] or head
        yield from source.spaces()
        out.call(name, arguments_of((yield from source.json())), head)
