"""The bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's fields."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from router.schema import (
    Harmless,
    Id,
    Messages,
    Positive,
    Priority,
    Stop,
    Temperature,
    TopK,
    TopP,
)

Blocks = Annotated[list[dict[str, Any]], Meta(max_length=1 << 16)]


class ThinkingOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether the model thinks before it answers."""

    type: Annotated[
        Literal["enabled", "adaptive", "between_tools", "disabled"],
        Meta(description="all but disabled ask the chat template for thinking"),
    ]
    budget_tokens: Annotated[
        Positive | None,
        Meta(description="most tokens of thinking, where the model has any; max_tokens by default"),
    ] = None
    display: Annotated[
        Literal["summarized", "omitted"] | None,
        Meta(description="omitted: blocks of thinking have a signature and no text"),
    ] = None


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """JSON of a schema, in place of any text."""

    type: Literal["json_schema"]
    definition: Annotated[dict[str, Any], Meta(description="the JSON schema")] = msgspec.field(
        name="schema"
    )


class OutputOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer is like."""

    effort: Annotated[
        Literal["low", "medium", "high", "xhigh", "max"] | None,
        Meta(description="the chat template's variable reasoning_effort, where it thinks"),
    ] = None
    format: OutputFormat | None = None


class ToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether tools are called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str | None, Meta(description="of the tool, where the type is tool")] = None
    disable_parallel_tool_use: Annotated[
        bool | None, Meta(description="true leaves out all calls but the first")
    ] = None


class CountRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages/count_tokens."""

    model: Annotated[
        str | None,
        Meta(description="one of /v1/models; the first for names that begin with claude"),
    ] = None
    messages: Messages
    system: Annotated[str | Blocks | None, Meta(description="text, or blocks of text")] = None
    tools: Annotated[
        Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None,
        Meta(description="tools of the client's that the model may call"),
    ] = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    cache_control: Harmless = None
    context_management: Harmless = None
    speed: Harmless = None


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages."""

    max_tokens: Annotated[
        Positive, Meta(description="most tokens of the answer; cut to the model's length")
    ]
    stop_sequences: Annotated[
        Annotated[list[Stop], Meta(max_length=128)] | None,
        Meta(description="strings that end the output"),
    ] = None
    stream: bool | None = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    priority: Priority = None
    request_id: Id = None
    diagnostics: Harmless = None
    inference_geo: Harmless = None
