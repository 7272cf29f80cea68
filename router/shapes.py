"""The bodies of answers, in OpenAI's shapes with vLLM's additions. What nobody asked for is null as
in vLLM, so that a program may read it; in the chunks of a chat, where it is UNSET, it is left out.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class PromptTokensDetails(msgspec.Struct):
    """How the prompt's tokens were come by."""

    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """What a request took. Of the prompt's tokens the prefix cache had ``cached_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(msgspec.Struct):
    """One token at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(msgspec.Struct):
    """Lists with an entry for each token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(msgspec.Struct, kw_only=True):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(msgspec.Struct):
    """One of the likeliest tokens at a position; ``bytes`` may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """The token of a position, and the likeliest ones there."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """An entry for each token."""

    content: list[TokenLogprob]


class CalledFunction(msgspec.Struct):
    """A function of the client's, and the JSON object that are its arguments."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that the model makes. In the chunks of a stream ``index`` says which."""

    index: int | UnsetType = UNSET
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(msgspec.Struct):
    """What the model says: null where it calls tools, or thinks, and says nothing. ``refusal`` is
    OpenAI's. The reasoning has two names, vLLM's and that of most clients."""

    role: str
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None


class ChatDelta(msgspec.Struct):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class PromptUsage(msgspec.Struct):
    """What a request took that generates nothing."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Embedding(msgspec.Struct):
    """The vector of one input, as numbers or as base64 of float32."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingList(msgspec.Struct, kw_only=True):
    """The answer of /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: PromptUsage


class Score(msgspec.Struct):
    """How well one pair of texts goes together."""

    index: int
    object: Literal["score"]
    score: float


class ScoreList(msgspec.Struct, kw_only=True):
    """The answer of /v1/score."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class RankedDocument(msgspec.Struct):
    """A document of the request's."""

    text: str


class Ranked(msgspec.Struct):
    """One document: its place in the request, and how well it answers the query."""

    index: int
    document: RankedDocument | None
    relevance_score: float


class Ranking(msgspec.Struct, kw_only=True):
    """The answer of /v1/rerank."""

    id: str
    model: str
    usage: PromptUsage
    results: list[Ranked]


class Model(msgspec.Struct, kw_only=True):
    """A name that requests may give."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(msgspec.Struct):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(msgspec.Struct, kw_only=True):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """The answer of /detokenize."""

    prompt: str


class Version(msgspec.Struct):
    """The answer of /version. ``batch_invariant``: whether a request's tokens are the same whatever
    shares its batch; null while no engine is there."""

    version: str
    batch_invariant: bool | None = None


class EngineState(msgspec.Struct, kw_only=True):
    """One engine, as this ingress process knows it."""

    engine_id: str
    model: str
    healthy: bool
    draining: bool
    recovering: bool
    running: int
    waiting: int
    waiting_tokens: int
    free_blocks: int
    blocks: int


class Load(msgspec.Struct, kw_only=True):
    """The answer of /load. ``server_load`` is the requests under way in this ingress process."""

    server_load: int
    engines: list[EngineState]
