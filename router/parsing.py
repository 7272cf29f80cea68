"""How a request's answers are taken apart: the format of the checkpoint, begun where the prompt
leaves off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from engine.errors import CheckpointError
from engine.log import get_logger
from engine.outputs import CompletionOutput
from engine.parsing.answers import AnswerFormat
from engine.parsing.formats import AUTO, NONE, answer_format, found_by
from engine.parsing.parser import Parser
from engine.parsing.parts import (
    Content,
    Folded,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
)
from engine.parsing.response_template import template_answer
from engine.parsing.source import NO_TAGS, Tags
from engine.tokenizer import Tokenizer
from router.errors import wrong
from router.models import ServedModel
from router.schema import ChatRequest
from router.shapes import CalledFunction, ChatDelta, ChatMessage, ToolCall
from router.tools import ToolUse

log = get_logger("router")


@dataclass(frozen=True)
class Parsing:
    """What a parser of one answer needs; see ``Parser``.

    prefix: how the answer begins, which is the prompt's end. shows_special: whether special tokens
    must be in the text. shows_reasoning: whether the client gets it.
    """

    form: AnswerFormat
    tools: Sequence[Mapping[str, Any]]
    opened: bool
    most_calls: int | None
    hidden: Tags
    prefix: str
    shows_special: bool
    shows_reasoning: bool

    def parser(self) -> Parser:
        """A parser for one answer."""
        parser = Parser(self.form, self.tools, self.opened, self.most_calls, self.hidden)
        parser.push(self.prefix)
        return parser

    def shown(self, parts: list[Part]) -> list[Part]:
        """The parts that the client gets."""
        if self.shows_reasoning:
            return parts
        return [part for part in parts if not isinstance(part, Reasoning)]


def form_of(model: ServedModel, chat_template: str | None, use: ToolUse) -> AnswerFormat | None:
    """The format of a chat's answers; None if they are text and no more.

    Raises ApiError for tools if no format of calls is known.
    """
    template = model.tokenizer.chat_template(chat_template, bool(use.tools)) or ""
    names = model.info.served.tool_call_parser, model.info.served.reasoning_parser
    form = answer_format(*names, template, bool(use.tools))
    if (
        model.tokenizer.response_template is not None
        and names == (AUTO, AUTO)
        and found_by(template)[0] == NONE
    ):
        form = _own(model.tokenizer, bool(use.tools))
    if use.tools and not (form and form.calls):
        raise wrong(
            "tools: it is not known how this model writes calls; the server's option"
            " --tool-call-parser names a format",
            "tools",
        )
    if use.strict and form is not None and not form.layouts:
        name = found_by(template)[0] if names[0] == AUTO else names[0]
        name = "the checkpoint's response_template" if name == NONE else name
        raise wrong(
            f"tools: strict is not supported in the format of this model's calls ({name})",
            "tools",
        )
    return form


@lru_cache(maxsize=16)
def _own(tokenizer: Tokenizer, with_tools: bool) -> AnswerFormat | None:
    try:
        return template_answer(tokenizer.response_template, with_tools)
    except CheckpointError as error:
        log.warning("%s; answers are taken for text", error)
        return None


@lru_cache(maxsize=64)
def _special(tokenizer: Tokenizer, form: AnswerFormat) -> tuple[bool, Tags]:
    """Whether marks of the format are special tokens, and the other special tokens if so."""
    added = tokenizer.backend.added_tokens
    special = {token for token, is_special in added.items() if is_special}
    used = {token for token in special if any(token in tag for tag in form.tags)}
    return bool(used), Tags(special - used) if used else NO_TAGS


def parsing_of(
    form: AnswerFormat,
    model: ServedModel,
    use: ToolUse,
    opened: bool,
    constrained: bool,
    body: ChatRequest,
) -> Parsing:
    """How answers are taken apart. opened: whether the prompt has begun the thinking. constrained:
    whether a grammar makes them calls, where they must be.

    Raises ApiError if the answer cannot be made to begin with a call.
    """
    prefix = form.prefix(use.name, opened) if use.forced and not constrained else ""
    if prefix is None or (use.forced and body.continue_final_message):
        raise wrong("tool_choice: this answer cannot be made to begin with a call", "tool_choice")
    uses_special, others = _special(model.tokenizer, form)
    return Parsing(
        form=form,
        tools=use.tools,
        opened=opened,
        most_calls=use.most_calls,
        hidden=NO_TAGS if body.skip_special_tokens is False else others,
        prefix=prefix.rstrip(" "),
        shows_special=uses_special,
        shows_reasoning=body.include_reasoning is not False,
    )


class ChoiceStream:
    """One choice of a stream: pieces of its text become deltas."""

    def __init__(self, parsing: Parsing) -> None:
        self._parsing = parsing
        self._parser = parsing.parser()
        self._called = False

    def push(self, text: str) -> ChatDelta | None:
        """What further text adds; None if nothing yet."""
        return self._delta(self._parser.push(text))

    def last(self, text: str, reason: str | None) -> tuple[ChatDelta, str | None]:
        """What further text adds, and an end for ``reason`` if that is one; the client's reason."""
        parts = self._parser.push(text)
        if reason is not None:
            parts += self._parser.finish(cut=reason != "stop")
        delta = self._delta(parts) or ChatDelta()
        return delta, _reason(reason, self._called)

    def _delta(self, parts: list[Part]) -> ChatDelta | None:
        calls: dict[int, ToolCall] = {}
        delta = None
        for part in self._parsing.shown(parts):
            delta = delta or ChatDelta()
            match part:
                case Content(text):
                    delta.content = (delta.content or "") + text
                case Reasoning(text):
                    delta.reasoning = delta.reasoning_content = (delta.reasoning or "") + text
                case ToolCallStart(index, id, name):
                    function = CalledFunction(name, "")
                    calls[index] = ToolCall(index=index, id=id, type="function", function=function)
                case ToolCallArguments(index, text):
                    calls[index].function.arguments += text
        if delta is not None and calls:
            delta.tool_calls = list(calls.values())
            self._called = True
        return delta


def whole_message(
    parsing: Parsing, role: str, output: CompletionOutput
) -> tuple[ChatMessage, str | None]:
    """A finished choice as a message, and why it ended: the fold of its stream."""
    parser = parsing.parser()
    parts = parser.push(output.text) + parser.finish(cut=output.finish_reason != "stop")
    folded = Folded().add(parsing.shown(parts))
    silent = bool(folded.calls or folded.reasoning)
    reasoning = folded.reasoning or None
    message = ChatMessage(
        role, folded.content or (None if silent else ""), None, reasoning, reasoning
    )
    if folded.calls:
        message.tool_calls = [
            ToolCall(id=c.id, type="function", function=CalledFunction(c.name, c.arguments))
            for c in folded.calls
        ]
    return message, _reason(output.finish_reason, bool(folded.calls))


def _reason(reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and reason == "stop" else reason
