"""What /v1/responses answers, in OpenAI's shapes."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.shapes import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class _Typed(msgspec.Struct, kw_only=True, tag_field="type"):
    """What says in its entry ``type`` what it is."""


class OutputText(_Typed, tag="output_text"):
    """Text for the user."""

    text: str = ""
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(_Typed, tag="reasoning_text"):
    """What the model thought."""

    text: str = ""


class SummaryText(_Typed, tag="summary_text"):
    """What the model thought, where a summary was asked for."""

    text: str = ""


class OutputMessage(_Typed, tag="message"):
    """What the model says."""

    id: str
    status: ItemStatus = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class ReasoningItem(_Typed, tag="reasoning"):
    """What the model thinks. ``encrypted_content``: see ``router.sealed``."""

    id: str
    status: ItemStatus = "in_progress"
    summary: list[SummaryText] = []
    content: list[ReasoningText] | UnsetType = UNSET
    encrypted_content: str | None = None


class FunctionCall(_Typed, tag="function_call"):
    """A call of a function of the client's."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"
    namespace: str | UnsetType = UNSET


class CustomToolCall(_Typed, tag="custom_tool_call"):
    """A call of a tool of the client's that takes text."""

    id: str
    call_id: str
    name: str
    input: str = ""
    status: ItemStatus = "in_progress"
    namespace: str | UnsetType = UNSET


Item = OutputMessage | ReasoningItem | FunctionCall | CustomToolCall


class CachedTokens(msgspec.Struct):
    """How the input's tokens were come by."""

    cached_tokens: int
    cache_write_tokens: int = 0


class ReasoningTokens(msgspec.Struct):
    """What the output's tokens were for."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    """What a request took."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseError(msgspec.Struct):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class Response(msgspec.Struct, kw_only=True):
    """The answer of /v1/responses. What the request asked for comes back in it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[Item] = []
    usage: ResponseUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    top_logprobs: int
    truncation: Literal["disabled"] = "disabled"
    background: Literal[None] = None
    previous_response_id: Literal[None] = None
    store: bool = False
