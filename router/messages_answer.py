"""POST /v1/messages and /v1/messages/count_tokens: a chat's run in Anthropic's shapes."""

import json
from typing import Any

from engine.outputs import Piece
from engine.parsing.parts import Content, Reasoning
from router.chat import ChatRun, length_of, run_of
from router.errors import ApiError, blaming
from router.generation import Generation
from router.messages_errors import error_body
from router.messages_input import asked_of, signature_of
from router.messages_schema import CountRequest, MessagesRequest
from router.messages_shapes import (
    AssistantMessage,
    ContentBlock,
    MessageUsage,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ThinkingTokens,
    TokenCount,
    ToolUseBlock,
)
from router.schema import ChatRequest
from router.sealed import seal
from router.service import Service
from router.typed import Block, TypedAnswer

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_PROVIDERS = ("claude", "anthropic")  # how the names of the provider's own models begin
# What a chat calls the fields that a request of this kind has.
_FIELDS = {
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}


async def answer_messages(service: Service, body: MessagesRequest) -> "MessagesAnswer":
    """The answer to come, of a request that can be served.

    Raises ApiError, naming what is wrong.
    """
    chat = await _asked(service, body)
    with blaming(_FIELDS):
        return MessagesAnswer(service, body, chat, await run_of(service, chat, fits=True))


async def count_tokens(service: Service, body: CountRequest, most: int) -> TokenCount:
    """How many tokens the prompt of a request would have; see ``length_of`` for ``most``.

    Raises ApiError, naming what is wrong.
    """
    chat = await _asked(service, body)
    with blaming(_FIELDS):
        return TokenCount(await length_of(service, chat, most))


async def _asked(service: Service, body: CountRequest) -> ChatRequest:
    return asked_of(body, await _model_of(body.model, service), service.config.strict_tools)


async def _model_of(name: str | None, service: Service) -> str | None:
    """The model that a request means: clients have names of the provider's models built in, for
    small tasks beside the user's, which the first of the server's models does."""
    if name is None or service.models.named(name) is not None or not name.startswith(_PROVIDERS):
        return name
    return (await service.models.load_all())[0].id


class MessagesAnswer(TypedAnswer):
    """An answer as blocks, whole or as a stream."""

    prefix = "msg_"
    id_headers = ("x-request-id", "request-id")
    waiting = alive = _PING

    def __init__(
        self, service: Service, body: MessagesRequest, chat: ChatRequest, run: ChatRun
    ) -> None:
        super().__init__(service, chat, run)
        self.name = body.model or self.name
        self._omits = body.thinking is not None and body.thinking.display == "omitted"
        self._message: AssistantMessage | None = None

    def _chunks(self, generation: Generation, pieces: list[Piece]) -> bytes:
        if self._message is None and pieces:  # now it is known what the prefix cache had
            self._message = AssistantMessage(
                id=self.id, model=self.name, content=[], usage=self._usage(generation, produced=0)
            )
            self._event("message_start", {"message": self._message})
            self._event("ping", {})
        return super()._chunks(generation, pieces)

    def _usage(self, generation: Generation, produced: int) -> MessageUsage:
        prompt = len(generation.output.prompt_token_ids)
        cached = generation.output.num_cached_tokens
        return MessageUsage(
            input_tokens=prompt - cached, cache_read_input_tokens=cached, output_tokens=produced
        )

    def failed(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error_body(error)

    # ---- blocks ----

    @property
    def _content(self) -> list[ContentBlock]:
        assert self._message is not None
        return self._message.content

    def _of_block(self, type: str, **fields: Any) -> None:
        """An event of the block that is being written."""
        index = len(self._content) - 1
        self._event(f"content_block_{type}", {"index": index, **fields})

    def _delta(self, type: str, **fields: Any) -> None:
        self._of_block("delta", delta={"type": type, **fields})

    def _start(self, block: Block) -> None:
        if block.kind is Content:
            self._content.append(TextBlock())
        elif block.kind is Reasoning:
            self._content.append(ThinkingBlock())
        else:
            self._content.append(ToolUseBlock(block.id, block.name, {}))
        self._of_block("start", content_block=self._content[-1])

    def _more(self, block: Block, text: str) -> None:
        match self._content[-1]:
            case TextBlock():
                self._delta("text_delta", text=text)
            case ThinkingBlock():
                if not self._omits:
                    self._delta("thinking_delta", thinking=text)
            case ToolUseBlock():
                self._delta("input_json_delta", partial_json=text)

    def _stop(self, block: Block, cut: bool) -> None:
        match self._content[-1]:
            case TextBlock() as shown:
                shown.text = block.text
            case ThinkingBlock() as shown:
                shown.thinking = "" if self._omits else block.text
                shown.signature = seal(block.text) if self._omits else signature_of(block.text)
                self._delta("signature_delta", signature=shown.signature)
            case ToolUseBlock() as shown:
                shown.input = json.loads(block.text)
        self._of_block("stop")

    # ---- the end ----

    def _finished(self, generation: Generation) -> None:
        assert self._message is not None
        message, (_, cause) = self._message, self._finish
        message.usage = self._usage(generation, self.length(generation.output.outputs[0]))
        if self._thinking_tokens:
            message.usage.output_tokens_details = ThinkingTokens(self._thinking_tokens)
        message.stop_reason = self._stop_reason(message.usage)
        if message.stop_reason == "stop_sequence":
            message.stop_sequence = str(cause)
        stop = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        self._event("message_delta", {"delta": stop, "usage": message.usage})
        self._event("message_stop", {})

    def _stop_reason(self, usage: MessageUsage) -> StopReason:
        reason, cause = self._finish
        if reason == "stop":
            if isinstance(cause, str):
                return "stop_sequence"
            return "tool_use" if self._called else "end_turn"
        total = usage.input_tokens + usage.cache_read_input_tokens + usage.output_tokens
        if total >= self.model.info.max_model_len:
            return "model_context_window_exceeded"
        return "max_tokens"

    def _whole(self) -> AssistantMessage:
        assert self._message is not None
        return self._message
