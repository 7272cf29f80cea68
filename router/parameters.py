"""From a request's fields to sampling parameters, as far as completions and chats agree."""

from typing import Any

from cluster.client import EngineInfo
from engine.sampling_params import SamplingParams
from router.errors import too_long, wrong
from router.schema import Sampling


def refuse_contradictions(body: Sampling, info: EngineInfo) -> None:
    """Raises ApiError for fields that are right, but not with each other or with this engine."""
    if not info.generates:
        raise wrong("the model generates no text: it has no output layer", "model")
    options = body.stream_options
    if options and (options.include_usage or options.continuous_usage_stats) and not body.stream:
        raise wrong("stream_options needs stream to be true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise wrong("prompt_logprobs: a stream has none", "prompt_logprobs")
    refuse_priority(body.priority, info)


def refuse_priority(priority: int | None, info: EngineInfo) -> None:
    """Raises ApiError for a priority where the engine knows none."""
    if priority and info.scheduling_policy != "priority":
        raise wrong(
            "priority needs a server with --scheduling-policy priority; this one's is"
            f" {info.scheduling_policy}",
            "priority",
        )


def sampling_of(body: Sampling, defaults: SamplingParams, **own: Any) -> SamplingParams:
    """The sampling parameters of a request's common fields, and ``own`` ones, which go before.

    Raises RequestError, naming the field.
    """
    values: dict[str, Any] = {}
    for name in _WITH_DEFAULTS:
        value = getattr(body, name)
        values[name] = getattr(defaults, name) if value is None else value
    for name in _WITHOUT_DEFAULTS:
        if (value := getattr(body, name)) is not None:
            values[name] = value
    return SamplingParams(**{**values, **own})


_WITH_DEFAULTS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
_WITHOUT_DEFAULTS = (
    "n", "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "min_tokens", "allowed_token_ids", "bad_words", "skip_special_tokens",
    "spaces_between_special_tokens",
)  # fmt: skip


def room_for_output(info: EngineInfo, length: int, asked: int | None, param: str) -> int:
    """How many tokens may follow a prompt of ``length`` tokens.

    Raises ApiError context_length_exceeded if none may, or not the ``asked`` ones.
    """
    most = info.max_model_len
    if length >= most or (asked is not None and length + asked > most):
        wanted = f" and {asked} of output were asked for" if asked is not None else ""
        raise too_long(most, f"{length} tokens{wanted}", param)
    return most - length
