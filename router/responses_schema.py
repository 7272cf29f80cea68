"""The bodies of POST /v1/responses: OpenAI's fields, and vLLM's beyond them."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from router.schema import (
    Effort,
    Harmless,
    Id,
    ModelName,
    MostTokens,
    ParallelToolCalls,
    Priority,
    Temperature,
    TemplateVariables,
    ThinkingBudget,
    Tools,
    TopK,
    TopP,
)

Includable = Literal[
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Stateless = Annotated[Any, Meta(description="not supported: nothing is kept on this server")]
Items = Annotated[list[dict[str, Any]], Meta(max_length=1 << 16)]


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer is: text of any kind, or JSON."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"] | None, Meta(description="text by default")
    ] = None
    name: str | None = None
    description: str | None = None
    definition: Annotated[dict[str, Any] | None, Meta(description="the JSON schema")] = (
        msgspec.field(name="schema", default=None)
    )
    strict: Annotated[
        bool | None, Meta(description="accepted; a schema is always enforced, whole")
    ] = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the text of the answer is."""

    format: TextFormat | None = None
    verbosity: Harmless = None


class ReasoningOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the model thinks, and how that is shown."""

    effort: Effort = None
    summary: Annotated[
        Literal["auto", "concise", "detailed"] | None,
        Meta(description="what the model thinks is told as the summary, all of it"),
    ] = None
    generate_summary: Annotated[
        Literal["auto", "concise", "detailed"] | None, Meta(description="summary's older name")
    ] = None
    context: Harmless = None


class ResponsesStreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells beside its text."""

    include_obfuscation: Annotated[
        bool | None, Meta(description="accepted; nothing is ever padded")
    ] = None


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses. Nothing is kept of it: the next request has to bring all items."""

    model: ModelName = None
    input: Annotated[
        str | Items,
        Meta(description="text, or messages, reasoning, calls and their outputs"),
    ]
    instructions: Annotated[str | None, Meta(description="a system message before them")] = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: MostTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Tools = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        Meta(
            description="auto; none, required, the function or custom tool that must be called, or"
            " allowed_tools"
        ),
    ] = None
    parallel_tool_calls: ParallelToolCalls = None
    include: Annotated[
        list[Includable] | None,
        Meta(
            description="reasoning.encrypted_content and message.output_text.logprobs; the others"
            " are nowhere in answers"
        ),
    ] = None
    metadata: Annotated[
        dict[str, str] | None, Meta(description="comes back; has no other effect")
    ] = None
    thinking_token_budget: ThinkingBudget = None
    chat_template_kwargs: TemplateVariables = None
    request_id: Id = None
    priority: Priority = None
    truncation: Annotated[
        Literal["disabled"] | None, Meta(description="nothing is ever left out of the input")
    ] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="how many likeliest tokens log-probabilities show; over 0 brings them"),
    ] = None
    background: Annotated[bool | None, Meta(description="not supported but for false")] = None
    previous_response_id: Stateless = None
    conversation: Stateless = None
    prompt: Stateless = None
    client_metadata: Harmless = None
    max_tool_calls: Harmless = None
    user: Harmless = None
