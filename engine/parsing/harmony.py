"""gpt-oss: messages with channels (openai/harmony, docs/format.md)."""

import re

from engine.parsing.answers import AnswerFormat, said
from engine.parsing.calls import Unfinished, arguments_of
from engine.parsing.parts import Writer
from engine.parsing.source import Ended, Malformed, Reading, Source, Tags
from engine.parsing.structure import CallLayout
from engine.parsing.values import Tools

_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_END_TAGS = Tags(_ENDS)
_HEADS = ("<|channel|>", " to=", "<|constrain|>", "<|message|>", "<|start|>")


class HarmonyAnswer(AnswerFormat):
    """The channel analysis is reasoning, final and commentary are content; a message to
    functions.NAME is a call, whatever its channel. What is written to tools that are built into
    the model is left out."""

    tags = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", *_ENDS)
    thoughts = (("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),)
    said = "<|channel|>final<|message|>"
    _CALL = "{name} <|constrain|>json<|message|>"
    layouts = (CallLayout("", "<|channel|>commentary to=functions.", _CALL, ""),)
    marked = (CallLayout("to=functions.", "to=functions.", _CALL, ""),)
    _HEAD_END = re.compile(r"<\|message\|>|<\|end\|>|<\|call\|>|<\|return\|>")
    _RECIPIENT = re.compile(r"to=([^\s<]+)")
    _CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
    _ROLE = re.compile(r"\s*(<\|start\|>)?\s*\w*")

    def opened_by(self, prompt: str, final: str = "") -> bool:
        return False  # the first header says it

    def prefix(self, name: str | None, opened: bool) -> str | None:
        return self.layouts[0].begin(name)

    def read(self, source: Source, out: Writer, tools: Tools, opened: bool) -> Reading[None]:
        out.trims = False
        try:
            if (yield from source.next_is(*_HEADS)) is None:
                yield from self._body(source, out, "final")  # it goes on with a message
            while True:
                yield from self._message(source, out)
        except Ended:
            if not source.cut:
                self._loose(source.text[source.at :], out)

    def _message(self, source: Source, out: Writer) -> Reading[None]:
        while source.at == len(source.text):
            yield from source.more()
        with Unfinished(source) as place:
            head, mark = yield from source.until(self._HEAD_END)
            place.whole()
        channels = self._CHANNEL.findall(head)
        recipient = self._RECIPIENT.search(head)
        to = recipient[1] if recipient else "assistant"
        if mark[0] != "<|message|>":
            self._loose(head, out)
        elif to.startswith("functions."):
            yield from self._call(to.removeprefix("functions."), source, out)
        else:
            channel = channels[-1] if channels else "final"
            yield from self._body(source, out, channel if to == "assistant" else "")

    def _loose(self, text: str, out: Writer) -> None:
        """A header that no message follows: what a model writes there is meant for someone."""
        text = Tags((*self.tags, "<|start|>assistant")).without(text)
        if text.strip():
            out.content(text)

    def _call(self, name: str, source: Source, out: Writer) -> Reading[None]:
        try:
            with Unfinished(source):
                empty = yield from source.next_is(*_ENDS)
                arguments = "{}" if empty else arguments_of((yield from source.json()))
        except Malformed:
            yield from self._body(source, out, "commentary")
            return
        out.call(name, arguments)
        yield from source.close(*_ENDS)

    def _body(self, source: Source, out: Writer, channel: str) -> Reading[None]:
        """The text of a message: to its end, which is one only if a message or nothing follows."""
        say = out.reasoning if channel == "analysis" else out.content if channel else _nothing
        while (length := (yield from said(source, _END_TAGS, say))) is not None:
            tag = source.text[source.at : source.at + length]
            source.at += length
            if (yield from source.next_is("<|start|>")) or source.at == len(source.text):
                out.boundary()
                return
            say(tag)


def _nothing(text: str) -> None:
    """Text that nobody gets."""
