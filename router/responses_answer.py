"""POST /v1/responses: a chat's run in OpenAI's newer shapes."""

import time
from collections.abc import Iterable
from typing import Any

from msgspec import UNSET

from engine.outputs import Piece
from engine.parsing.parts import Content, Part, Reasoning
from engine.parsing.source import NO_TAGS
from router.answers import CALLING
from router.chat import ChatRun, run_of
from router.errors import ApiError, blaming
from router.fields import without_nulls
from router.generation import Generation
from router.responses_input import AskedResponse, asked_of
from router.responses_schema import ResponsesRequest
from router.responses_shapes import (
    CachedTokens,
    CustomToolCall,
    FunctionCall,
    IncompleteDetails,
    Item,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ReasoningTokens,
    Response,
    ResponseError,
    ResponseUsage,
    SummaryText,
)
from router.responses_tools import custom_input
from router.sealed import seal
from router.service import Service
from router.shapes import TokenLogprob
from router.text_logprobs import SpelledParts
from router.typed import Block, TypedAnswer

# What a chat calls the fields that a request of this kind has.
_FIELDS = {
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning",
    "logprobs": "top_logprobs",
}


async def answer_responses(service: Service, body: ResponsesRequest) -> "ResponsesAnswer":
    """The answer to come, of a request that can be served.

    Raises ApiError, naming what is wrong.
    """
    asked = asked_of(body, service.config.strict_tools)
    with blaming(_FIELDS):
        return ResponsesAnswer(service, body, asked, await run_of(service, asked.chat))


class ResponsesAnswer(TypedAnswer):
    """An answer as items, whole or as a stream."""

    prefix = "resp_"
    alive = CALLING

    def __init__(
        self, service: Service, body: ResponsesRequest, asked: AskedResponse, run: ChatRun
    ) -> None:
        super().__init__(service, asked.chat, run)
        self._tools = asked.tools
        self._seals = "reasoning.encrypted_content" in (body.include or ())
        reasoning = body.reasoning
        self._summarizes = bool(reasoning and (reasoning.summary or reasoning.generate_summary))
        self._number = 0  # of the next event
        self._spelled: SpelledParts | None = None  # where log-probabilities are asked for
        self._logprobs: list[TokenLogprob] = []  # of the text that comes next
        self._response = _opened(self, body)

    # ---- events ----

    def _event(self, type: str, fields: dict[str, Any]) -> None:
        super()._event(type, {"sequence_number": self._number, **fields})
        self._number += 1

    def _of_item(self, type: str, **fields: Any) -> None:
        """An event of the item that is being written."""
        index = len(self._response.output) - 1
        where = {"item_id": self._item.id, "output_index": index}
        self._event(f"response.{type}", {**where, **fields})

    def _of_part(self, type: str, **fields: Any) -> None:
        self._of_item(type, content_index=0, **fields)

    @property
    def _item(self) -> Item:
        return self._response.output[-1]

    def _begin(self) -> bytes:
        for type in ("created", "in_progress"):
            self._event(f"response.{type}", {"response": self._response})
        return self._taken()

    def failed(self, error: ApiError) -> bytes:
        self._response.status = "failed"
        self._response.error = ResponseError("server_error", error.info.message)
        self._event("response.failed", {"response": self._response})
        return self._taken()

    # ---- items ----

    def _parts(self, generation: Generation, piece: Piece) -> Iterable[Part]:
        if self.sampling.logprobs is None:
            yield from super()._parts(generation, piece)
            return
        output = generation.output
        if self._spelled is None:
            hidden = self._parsing.hidden if self._parsing else NO_TAGS
            self._spelled = SpelledParts(
                self.model.tokenizer, self.sampling, output.prompt_token_ids, self._parser, hidden
            )
        for part, logprobs in self._spelled.read(output.outputs[0], piece):
            self._logprobs = logprobs
            yield part

    def _start(self, block: Block) -> None:
        self._response.output.append(self._new(block))
        index = len(self._response.output) - 1
        self._event("response.output_item.added", {"output_index": index, "item": self._item})
        match self._item:
            case OutputMessage(content=parts):
                parts.append(OutputText())
                self._of_part("content_part.added", part=parts[0])
            case ReasoningItem(summary=parts) if self._summarizes:
                parts.append(SummaryText())
                self._of_item("reasoning_summary_part.added", summary_index=0, part=parts[0])
            case ReasoningItem() as item:
                item.content = [ReasoningText()]
                self._of_part("content_part.added", part=item.content[0])

    def _new(self, block: Block) -> Item:
        unique = f"{self._unique}_{len(self._response.output)}"
        if block.kind is Content:
            return OutputMessage(id=f"msg_{unique}", content=[])
        if block.kind is Reasoning:
            return ReasoningItem(id=f"rs_{unique}", summary=[])
        tool = self._tools.called(block.name)
        kind, short = (CustomToolCall, "ctc") if tool.custom else (FunctionCall, "fc")
        return kind(
            id=f"{short}_{unique}",
            call_id=block.id,
            name=tool.name,
            namespace=tool.namespace or UNSET,
        )

    def _more(self, block: Block, text: str) -> None:
        match self._item:
            case OutputMessage(content=[part]):
                part.logprobs += self._logprobs
                self._of_part("output_text.delta", delta=text, logprobs=self._logprobs)
            case ReasoningItem() if self._summarizes:
                self._of_item("reasoning_summary_text.delta", summary_index=0, delta=text)
            case ReasoningItem():
                self._of_part("reasoning_text.delta", delta=text)
            case FunctionCall():
                self._of_item("function_call_arguments.delta", delta=text)

    def _stop(self, block: Block, cut: bool) -> None:
        text = block.text
        match self._item:
            case OutputMessage(content=[part]):
                part.text = text
                self._of_part("output_text.done", text=text, logprobs=part.logprobs)
                self._of_part("content_part.done", part=part)
            case ReasoningItem() as item:
                self._stop_thinking(item, text)
            case FunctionCall() as item:
                item.arguments = text
                self._of_item("function_call_arguments.done", name=item.name, arguments=text)
            case CustomToolCall() as item:
                item.input = custom_input(text)
                self._of_item("custom_tool_call_input.delta", delta=item.input)
                self._of_item("custom_tool_call_input.done", input=item.input)
        self._item.status = "incomplete" if cut else "completed"
        index = len(self._response.output) - 1
        self._event("response.output_item.done", {"output_index": index, "item": self._item})

    def _stop_thinking(self, item: ReasoningItem, text: str) -> None:
        if self._seals:
            item.encrypted_content = seal(text)
        if self._summarizes:
            item.summary[0].text = text
            self._of_item("reasoning_summary_text.done", summary_index=0, text=text)
            self._of_item("reasoning_summary_part.done", summary_index=0, part=item.summary[0])
        elif item.content:
            item.content[0].text = text
            self._of_part("reasoning_text.done", text=text)
            self._of_part("content_part.done", part=item.content[0])

    # ---- the end ----

    def _finished(self, generation: Generation) -> None:
        response, usage = self._response, self.usage([generation])
        response.status = "completed" if self._finish[0] == "stop" else "incomplete"
        if self._finish[0] == "length":
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        response.completed_at = int(time.time())
        response.usage = ResponseUsage(
            usage.prompt_tokens,
            CachedTokens(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            ReasoningTokens(self._thinking_tokens),
            usage.total_tokens,
        )
        self._event(f"response.{response.status}", {"response": response})

    def _whole(self) -> Response:
        return self._response


def _opened(answer: ResponsesAnswer, body: ResponsesRequest) -> Response:
    """The response before anything is in it, with what was asked for."""
    form = body.text.format if body.text else None
    text = {"format": form or {"type": "text"}}
    reasoning = {"effort": None, "summary": None} | without_nulls(body.reasoning)
    return Response(
        id=answer.id,
        created_at=answer.created,
        model=answer.name,
        output=[],
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=reasoning,
        temperature=answer.sampling.temperature,
        text=text,
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_p=answer.sampling.top_p,
        top_logprobs=answer.sampling.logprobs or 0,
    )
