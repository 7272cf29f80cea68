"""What /v1/messages answers, in Anthropic's shapes."""

from typing import Any, Literal

import msgspec

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    """Text for the user."""

    text: str = ""


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """What the model thought. It comes back with its signature, which holds the thinking where the
    client asked for none of its text."""

    thinking: str = ""
    signature: str = ""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A call of a tool of the client's."""

    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class ThinkingTokens(msgspec.Struct):
    """What the output's tokens were for."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    """What a request took. ``input_tokens`` are those that the prefix cache had not."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens | None = None


class AssistantMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """The answer of /v1/messages."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class MessagesErrorInfo(msgspec.Struct):
    """What went wrong."""

    type: str
    message: str


class MessagesError(msgspec.Struct, tag_field="type", tag="error"):
    """The body of every answer of these routes that is an error, and of an error event."""

    error: MessagesErrorInfo
