"""Calls whose arguments stand in tags, as bare text."""

import re
from collections.abc import Iterable
from typing import Any

from engine.parsing.calls import CallFormat, Unfinished
from engine.parsing.parts import Writer
from engine.parsing.source import Malformed, Reading, Source, dumps
from engine.parsing.structure import CallLayout
from engine.parsing.values import Tools


class FunctionTags(CallFormat):
    """Qwen3-Coder, Qwen3.5 and later, Seed-OSS: <function=NAME>, <parameter=KEY>, values on lines
    of their own. The tag around a call may be missing, and so may the end of a parameter. What
    ends a value counts only if what must follow it does, so that values may have tags in them."""

    ends_reasoning = True
    _NAME = re.compile(r"<function=([^>\n]{1,200})>")
    _NEXT = re.compile(r"\s{0,64}(?:<parameter=([^>\n]{1,128})>|</function>)")
    _VALUE = re.compile(
        r"\n?</parameter>(?=\s{0,64}(?:<parameter=|</function>))"
        r"|\n(?=<parameter=[^>\n]{1,128}>\n)|\n(?=</function>\s{0,16}</)"
    )

    def __init__(self, around: tuple[str, str] = ("<tool_call>", "</tool_call>")) -> None:
        self.openers = (around[0], "<function=")
        self.tags = (around[1],)
        self._around = around
        parameter = "<parameter={key}>\n", "\n</parameter>\n"
        tail, end = "</function>", f"\n{around[1]}"
        self.layouts = (
            CallLayout(
                around[0], f"{around[0]}\n<function=", "{name}>\n", tail, end,
                apart="\n", parameter=parameter,
            ),
            CallLayout(
                "<function=", "<function=", "{name}>\n", tail, end, apart="\n", parameter=parameter
            ),
        )  # fmt: skip

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source) as place:
            yield from source.skip(self._around[0])
            yield from source.spaces()
            if (yield from source.next_is("<function=")) is None:
                raise Malformed
            noise, head = yield from source.until(self._NAME)
            if noise:
                raise Malformed
            name, arguments = head[1].strip(), dict[str, Any]()
            while True:
                noise, mark = yield from source.until(self._NEXT)
                if noise.strip():
                    raise Malformed
                if mark[1] is None:
                    break
                text, _ = yield from source.until(self._VALUE)
                key, text = mark[1].strip(), text.removeprefix("\n")
                arguments[key] = tools.value(name, key, text)
            out.call(name, dumps(arguments))
            place.whole()
            yield from source.close(self._around[1])


class KeyValueTags(CallFormat):
    """GLM 4.5 and later: a name, then <arg_key> and <arg_value> in turn."""

    openers = ("<tool_call>",)
    tags = ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    layouts = (
        CallLayout(
            "<tool_call>", "<tool_call>", "{name}\n", "</tool_call>", apart="\n",
            parameter=("<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n"),
        ),
    )  # fmt: skip
    _NEXT = re.compile(r"\s{0,64}(?:<arg_key>|</tool_call>)")
    _KEY = re.compile(r"</arg_key>\s{0,64}<arg_value>")
    _VALUE = re.compile(
        r"</arg_value>(?=\s{0,64}(?:<arg_key>|</tool_call>))|(?=</tool_call>\s{0,64}<tool_call>)"
    )
    _LAST_VALUE = re.compile(r"</arg_value>|(?=</tool_call>\s*\Z)")

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source):
            source.at += len(self.openers[0])
            name, mark = yield from source.until(self._NEXT)
            name, arguments = name.strip(), dict[str, Any]()
            if not re.fullmatch(r"[\w./:-]+", name):
                raise Malformed
            while mark[0].endswith("<arg_key>"):
                key, _ = yield from source.until(self._KEY)
                text, _ = yield from source.until(self._VALUE, self._LAST_VALUE)
                arguments[key.strip()] = tools.value(name, key.strip(), text)
                _, mark = yield from source.until(self._NEXT)
            out.call(name, dumps(arguments))


class InvokeTags(CallFormat):
    """<invoke name="NAME"> and <parameter name="KEY"> in a section: MiniMax M2, and DeepSeek V3.2
    and later, whose tags begin with ｜DSML｜ and say whether a value is a string.

    mark: what the tags begin with. sections: the names that the section's tag may have.
    """

    def __init__(self, mark: str, sections: Iterable[str]) -> None:
        self.openers = tuple(f"<{section}>" for section in sections)
        self.tags = tuple(f"</{section}>" for section in sections)
        tag = re.escape(mark) + " ?"
        own = f"{mark}{' ' if ' ' in self.openers[0] else ''}"
        told = ' string="{string}"' if mark else ""
        parameter = f'<{own}parameter name="{{key}}"{told}>', f"</{own}parameter>\n"
        head, tail = f'<{own}invoke name="{{name}}">\n', f"</{own}invoke>\n"
        self.layouts = tuple(
            CallLayout(opener, f"{opener}\n", head, tail, closer, "", None, parameter)
            for opener, closer in zip(self.openers, self.tags, strict=True)
        )
        ends = "|".join(re.escape(end) for end in self.tags)
        self._next = re.compile(rf'<{tag}invoke name="([^"\n]{{1,200}})"\s*(/?)>|{ends}')
        self._inside = re.compile(
            rf'<{tag}parameter name="([^"\n]{{1,128}})"(?: string="(true|false)")?>'
            rf"|</{tag}invoke>"
        )
        self._value = re.compile(
            rf"</{tag}parameter>(?=\s{{0,64}}(?:<{tag}parameter |</{tag}invoke>))"
        )

    def read(self, source: Source, out: Writer, tools: Tools) -> Reading[None]:
        with Unfinished(source) as place:
            yield from source.skip(*self.openers)
            while True:
                noise, mark = yield from source.until(self._next)
                if noise.strip():
                    raise Malformed
                if mark[0] in self.tags:
                    return
                arguments: dict[str, Any] = {}
                if not mark[2]:
                    yield from self._parameters(mark[1], arguments, source, tools)
                out.call(mark[1], dumps(arguments))
                place.whole()

    def _parameters(
        self, name: str, arguments: dict[str, Any], source: Source, tools: Tools
    ) -> Reading[None]:
        while True:
            noise, mark = yield from source.until(self._inside)
            if noise.strip():
                raise Malformed
            if mark[1] is None:
                return
            text, _ = yield from source.until(self._value)
            is_string = mark[2] == "true"
            arguments[mark[1]] = text if is_string else tools.value(name, mark[1], text)
