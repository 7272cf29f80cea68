"""What ``LLM`` and the handles take: prompts, chats and sampling parameters, one or many."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import RequestError
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
Tokenized = tuple[str | None, list[int]]  # the text, if it was text, and the token ids


def text_prompts(tokenizer: Tokenizer, prompts: Any) -> list[Tokenized]:
    """One prompt or a list of them: strings, token id lists, or dicts of either.

    Raises RequestError, naming the prompt.
    """
    if isinstance(prompts, str | Mapping) or (_is_ids(prompts) and len(prompts)):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(
            f"prompts must be a prompt or a list of prompts, got {reprlib.repr(prompts)}"
        )
    texts: list[str | None] = []
    for number, prompt in enumerate(prompts):
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        texts.append(text if isinstance(text, str) else None)
        _check_prompt(number, prompt)
    ids = iter(tokenizer.encode([t for t in texts if t is not None]))
    return [
        (text, next(ids))
        if text is not None
        else (None, list(p["prompt_token_ids"] if isinstance(p, Mapping) else p))
        for text, p in zip(texts, prompts, strict=True)
    ]


def chat_prompts(
    tokenizer: Tokenizer, messages: Any, template: str | None, **options: Any
) -> list[Tokenized]:
    """One conversation or a list of them, rendered by ``template`` or the tokenizer's own.

    Raises RequestError for messages that the template refuses.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a non-empty list of messages, or of such lists")
    conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
    prompts: list[Tokenized] = []
    for conversation in conversations:
        text = tokenizer.render_chat(conversation, template, **options)
        prompts.append(tokenizer.encode_chat(text))
    return prompts


def one_for_each(
    given: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams, count: int
) -> list[SamplingParams]:
    """Sampling parameters for ``count`` prompts. Raises RequestError for another number."""
    if given is None:
        given = default
    if isinstance(given, SamplingParams):
        return [given] * count
    params = list(given) if isinstance(given, Sequence) else []
    if len(params) != count or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(
            f"sampling_params must be one SamplingParams or {count} of them, one for each prompt"
        )
    return params


def checked_priority(given: Any, policy: str, count: int) -> list[int]:
    """A priority for each of ``count`` prompts. Raises RequestError."""
    if given is None:
        return [0] * count
    if policy != "priority":
        raise RequestError("priority needs scheduling_policy='priority'")
    if not isinstance(given, Sequence) or len(given) != count:
        raise RequestError(f"priority must be a list of {count}, one for each prompt")
    return list(given)


def _check_prompt(number: int, prompt: Any) -> None:
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys == {"prompt"} and isinstance(prompt["prompt"], str):
            return
        if keys == {"prompt_token_ids"} and _is_ids(prompt["prompt_token_ids"]):
            return
    elif isinstance(prompt, str) or _is_ids(prompt):
        return
    raise RequestError(
        f"prompt {number} must be a string, a list of token ids, or a dict with 'prompt' or"
        f" 'prompt_token_ids', got {reprlib.repr(prompt)}"
    )


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    )
