"""The bodies of requests: OpenAI's fields, vLLM's beyond them, and nothing that has no effect.

Structs of msgspec: checked when read, and the OpenAPI description is made from them.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MOST_CHOICES = 128
MOST_PROMPTS = 2048
MOST_DETOKENIZED = 1 << 16
_INT32 = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=_INT32)]
Positive = Annotated[int, Meta(ge=1, le=_INT32)]
TokenId = Annotated[int, Meta(ge=0, le=_INT32)]
Logprobs = Annotated[int, Meta(ge=-1, le=_INT32)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Text = Annotated[str, Meta(min_length=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=4096)]
BadWord = Annotated[str, Meta(min_length=1, max_length=1024)]


Prompts = (
    str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1, max_length=1 << 22)]
)
Priority = Annotated[
    Annotated[int, Meta(ge=-_INT32, le=_INT32)] | None,
    Meta(description="lower first; needs the server's scheduling_policy 'priority'"),
]
Id = Annotated[
    Annotated[str, Meta(pattern=r"^[!-~]{1,256}(?!\n)$")] | None,
    Meta(
        description="the end of the answer's id, and x-request-id; the request's header of that"
        " name by default"
    ),
]
ModelName = Annotated[
    str | None, Meta(description="one of /v1/models; may be left out where there is one")
]
User = Annotated[str | None, Meta(description="accepted; has no effect")]

# How a chat becomes a prompt, for chats and for /tokenize.
Messages = Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=1 << 16)]
AddGenerationPrompt = Annotated[
    bool | None, Meta(description="begin the assistant's answer; not continue_final_message")
]
ContinueFinalMessage = Annotated[
    bool | None, Meta(description="the answer goes on where the last message ends")
]
AddSpecialTokens = Annotated[
    bool | None, Meta(description="add a begin token; true for a prompt, false for a chat")
]
ChatTemplate = Annotated[
    str | None,
    Meta(description="the name of one of the checkpoint's templates, or a template itself, which"
         " the server must be told to trust"),
]  # fmt: skip
TemplateVariables = Annotated[
    dict[str, Any] | None,
    Meta(
        description="further variables of the chat template; one that it does not use has no effect"
    ),
]
Tools = Annotated[
    Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None,
    Meta(description="functions that the model may call"),
]
Documents = Annotated[
    list[dict[str, str]] | None, Meta(description="for chat templates that take documents")
]
Temperature = Annotated[
    Annotated[float, Meta(ge=0, le=100)] | None, Meta(description="0 is greedy")
]
TopP = Annotated[float, Meta(gt=0, le=1)] | None
TopK = Annotated[Annotated[int, Meta(ge=-1, le=_INT32)] | None, Meta(description="0 or -1 is off")]
MostTokens = Annotated[Positive | None, Meta(description="as many as the model's length allows")]
ParallelToolCalls = Annotated[
    bool | None, Meta(description="false leaves out all calls but the first")
]
Effort = Annotated[
    Annotated[str, Meta(pattern="^(none|minimal|low|medium|high|xhigh|max)$")] | None,
    Meta(description="a variable of the chat template; none also asks it for no thinking"),
]
ThinkingBudget = Annotated[
    Annotated[int, Meta(ge=-1, le=_INT32)] | None,
    Meta(
        description="most tokens of thinking, after which its end is written for the model; 0"
        " leaves it none, -1 is no bound"
    ),
]
Harmless = Annotated[Any, Meta(description="accepted; has no effect")]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells beside its text."""

    include_usage: Annotated[
        bool | None, Meta(description="a last chunk without choices tells the usage")
    ] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="every chunk tells the usage so far")
    ] = None
    include_obfuscation: Annotated[
        bool | None, Meta(description="accepted; nothing is ever padded")
    ] = None


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema of ``response_format``."""

    name: Annotated[str, Meta(max_length=256)] | None = None
    description: str | None = None
    definition: Annotated[
        dict[str, Any] | None, Meta(description="the JSON schema; any value by default")
    ] = msgspec.field(name="schema", default=None)
    strict: Annotated[
        bool | None, Meta(description="accepted; a schema is always enforced, whole")
    ] = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer is: text of any kind, or JSON."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"] | None, Meta(description="text by default")
    ] = None
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the whole answer must match: one of these. docs/api.md says what is enforced."""

    json: Annotated[str | dict[str, Any] | None, Meta(description="a JSON schema")] = None
    regex: Annotated[str | None, Meta(description="in the syntax of Rust's crate regex")] = None
    choice: Annotated[
        Annotated[list[str], Meta(max_length=1 << 14)] | None, Meta(description="one of these")
    ] = None
    grammar: Annotated[str | None, Meta(description="in Lark's notation, or GBNF")] = None
    json_object: Annotated[bool | None, Meta(description="true: any JSON object")] = None
    structural_tag: Annotated[
        str | dict[str, Any] | None,
        Meta(description="structures that triggers begin, in text that is free else"),
    ] = None
    whitespace_pattern: Annotated[
        str | None, Meta(description="a regex for the whitespace within JSON")
    ] = None
    disable_any_whitespace: Annotated[
        bool | None, Meta(description="no whitespace within JSON")
    ] = None
    disable_additional_properties: Annotated[
        bool | None, Meta(description="not supported but for false")
    ] = None


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that completions and chats have in common. null is the same as leaving out;
    where no default is said it is the checkpoint's generation_config.json's, or none at all."""

    model: ModelName = None
    n: Annotated[
        Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None, Meta(description="choices; 1")
    ] = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[
        Annotated[dict[str, float], Meta(max_length=1 << 14)] | None,
        Meta(description="token ids to what is added to their logits, at most 100 either way"),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
        Meta(description="makes the answer a function of the request alone"),
    ] = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Meta(max_length=128)] | None,
        Meta(description="strings that end the output"),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=4096)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=1 << 18)] | None = (
        None
    )
    bad_words: Annotated[list[BadWord], Meta(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: Annotated[bool | None, Meta(description="true by default")] = None
    spaces_between_special_tokens: Annotated[bool | None, Meta(description="true by default")] = (
        None
    )
    prompt_logprobs: Annotated[
        Logprobs | None, Meta(description="log-probabilities of the prompt's tokens; no stream")
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: Annotated[
        bool | None, Meta(description="token_ids and prompt_token_ids in the answer")
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Meta(description="tokens of logprobs are written 'token_id:ID'")
    ] = None
    priority: Priority = None
    request_id: Id = None
    user: User = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n


class CompletionRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[Count | None, Meta(description="16; 0 only with echo")] = None
    echo: Annotated[bool | None, Meta(description="the text begins with the prompt")] = None
    logprobs: Annotated[
        Logprobs | None, Meta(description="log-probabilities of this many likeliest tokens")
    ] = None
    add_special_tokens: AddSpecialTokens = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message. Only text is understood."""

    type: Annotated[str, Meta(pattern="^text$")]
    text: str


class Message(msgspec.Struct, kw_only=True):
    """A message of a chat. Which roles there are, and in which order, the chat template says."""

    role: Text
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """What describes a function to the model. Further entries go to the chat template as well."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:/-]{1,128}(?!\n)$")]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Meta(description="a JSON schema")] = None
    strict: Annotated[
        bool | None, Meta(description="true: the arguments of a call match parameters")
    ] = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool that the model may call."""

    type: Annotated[str, Meta(pattern="^function$")]
    function: FunctionTool


class ChatRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Messages
    tools: Tools = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        Meta(description="auto; none, required, or the function that must be called"),
    ] = None
    parallel_tool_calls: ParallelToolCalls = None
    reasoning_effort: Effort = None
    thinking_token_budget: ThinkingBudget = None
    include_reasoning: Annotated[
        bool | None, Meta(description="false leaves the reasoning out of the answer")
    ] = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    add_special_tokens: AddSpecialTokens = None
    chat_template: ChatTemplate = None
    chat_template_kwargs: TemplateVariables = None
    documents: Documents = None
    max_completion_tokens: MostTokens = None
    max_tokens: Annotated[
        Positive | None,
        Meta(description="the older name of max_completion_tokens, which goes before"),
    ] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[
        Logprobs | None, Meta(description="how many likeliest tokens logprobs show; 0")
    ] = None
    echo: Annotated[
        bool | None,
        Meta(description="the answer begins with the final message that it continues"),
    ] = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    add_special_tokens: AddSpecialTokens = None
    chat_template: ChatTemplate = None
    chat_template_kwargs: TemplateVariables = None
    documents: Documents = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: Annotated[
        list[TokenId],
        Meta(description=f"at most {MOST_DETOKENIZED}, or as many as the model's length"),
    ]
    model: str | None = None


class PoolingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that all requests for vectors have in common."""

    model: ModelName = None
    use_activation: Annotated[
        bool | None,
        Meta(description="embeddings of length 1, scores as probabilities; as the checkpoint says"),
    ] = None
    priority: Priority = None
    request_id: Id = None
    user: User = None


class EmbeddingRequest(PoolingRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings."""

    input: Prompts
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Meta(description="base64: float32, little-endian; float by default"),
    ] = None
    dimensions: Annotated[
        Positive | None, Meta(description="only so many leading values; all by default")
    ] = None
    add_special_tokens: AddSpecialTokens = None


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """A text, as some clients write it."""

    text: str


Texts = Annotated[list[str], Meta(min_length=1, max_length=MOST_PROMPTS)]


class RerankRequest(PoolingRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/rerank."""

    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MOST_PROMPTS)]
    top_n: Annotated[Count | None, Meta(description="the best ones; 0, all by default")] = None
    return_documents: Annotated[
        bool | None, Meta(description="the documents in the answer; true by default")
    ] = None


class ScoreRequest(PoolingRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/score."""

    text_1: Annotated[str | Texts, Meta(description="a text, or one for each of text_2")]
    text_2: str | Texts
