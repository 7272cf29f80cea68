"""What ``LLM`` and the handles take: prompts, chats and sampling parameters, one or many."""

import random
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.chat import check_variables
from engine.continuation import SYSTEM_RANDOM, Continuation, begin
from engine.errors import RequestError
from engine.parsing.answers import AnswerFormat, thinking_budget
from engine.sampling_params import SamplingParams
from engine.thinking import ThinkingBudget
from engine.tokenizer import Tokenizer
from engine.values import asks_for_nothing

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
_KEYS = ("prompt", "prompt_token_ids")
_LONGEST_OPENER = 64  # tokens of what begins thinking, and spaces after it
Tokenized = tuple[str | None, list[int]]  # the text, if it was text, and the token ids

# Arguments of vLLM's methods that manta has not, and what there is instead.
_NOT_TAKEN = {
    "guided_options_request": "SamplingParams has structured_outputs",
    "lora_request": "there are no LoRA adapters",
    "mm_processor_kwargs": "prompts are text",
    "prompt_adapter_request": "there are no prompt adapters",
    "prompt_token_ids": 'a prompt may be {"prompt_token_ids": [...]}',
    "tokenization_kwargs": "a prompt may be token ids, made in any way",
}


def refuse_arguments(method: str, given: Mapping[str, Any]) -> None:
    """Let pass what asks for nothing among the further arguments that a ``method`` was given.

    Raises RequestError for those of vLLM's that ask for something, TypeError for unknown ones.
    """
    for name, value in given.items():
        if name not in _NOT_TAKEN:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        each = value if isinstance(value, list) else [value]
        if not all(map(asks_for_nothing, each)):
            raise RequestError(f"{name} is not supported: {_NOT_TAKEN[name]}")


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
    tokenizer: Tokenizer,
    messages: Any,
    template: str | None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Tokenized]:
    """One conversation or a list of them, rendered by ``template`` or the tokenizer's own.

    Raises RequestError for messages that the template refuses.
    """
    variables = check_variables(chat_template_kwargs or {})
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a non-empty list of messages, or of such lists")
    conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
    prompts: list[Tokenized] = []
    for conversation in conversations:
        text = tokenizer.render_chat(
            conversation,
            template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **variables,
        )
        prompts.append(tokenizer.encode_chat(text))
    return prompts


def requests_of(
    tokenizer: Tokenizer,
    form: AnswerFormat | None,
    prompts: Sequence[Tokenized],
    sampling: Sequence[SamplingParams],
    priorities: Sequence[int],
    timeout: float | None,
    request_ids: Iterator[str],
    draw: random.Random = SYSTEM_RANDOM,
) -> list[Continuation]:
    """A request for each prompt; those without a seed get theirs from ``draw``. ``form`` is how the
    model writes its answers, if that is known.

    Raises RequestError, naming the prompt, for bad_words that are no tokens, and for a bound on the
    thinking of a model that has none.
    """
    requests = []
    each = zip(prompts, sampling, priorities, strict=True)
    for number, ((text, ids), params, priority) in enumerate(each):
        try:
            bad_words = tokenizer.bad_words_ids(params.bad_words)
            thinking = _bounded(tokenizer, form, params, text, ids)
        except RequestError as error:
            raise RequestError(f"prompt {number}: {error}") from None
        requests.append(
            begin(
                next(request_ids),
                ids,
                params,
                bad_words=bad_words,
                thinking=thinking,
                priority=priority,
                timeout=timeout,
                draw=draw,
            )
        )
    return requests


def _bounded(
    tokenizer: Tokenizer,
    form: AnswerFormat | None,
    params: SamplingParams,
    text: str | None,
    ids: list[int],
) -> ThinkingBudget | None:
    """What bounds the thinking after a prompt. Raises RequestError."""
    if params.thinking_token_budget is None:
        return None
    if params.structured_outputs is not None:
        raise RequestError(
            "thinking_token_budget must be None with structured_outputs, which the whole output"
            " matches"
        )
    if text is None:
        text = tokenizer.decode(ids[-_LONGEST_OPENER:])
    opened = form is not None and form.opened_by(text)
    return thinking_budget(form, params.thinking_token_budget, opened)


def one_for_each(
    given: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams, count: int
) -> list[SamplingParams]:
    """Sampling parameters for ``count`` prompts, copied: the caller may go on to change its own.

    Raises RequestError for another number of them.
    """
    if given is None:
        given = default
    if isinstance(given, SamplingParams):
        return [given.clone()] * count
    params = list(given) if isinstance(given, Sequence) else []
    if len(params) != count or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(
            f"sampling_params must be one SamplingParams or {count} of them, one for each prompt"
        )
    return [p.clone() for p in params]


def checked_priority(given: Any, policy: str, count: int) -> list[int]:
    """A priority for each of ``count`` prompts, from one for each or one for all.

    Raises RequestError, also for any but 0 under a policy that knows no priorities.
    """
    given = 0 if given is None else given
    priorities = [given] * count if type(given) is int else given
    if not isinstance(priorities, Sequence) or len(priorities) != count:
        raise RequestError(f"priority must be an integer or a list of {count}, one for each prompt")
    if policy != "priority" and any(priority != 0 for priority in priorities):
        raise RequestError("priority needs scheduling_policy='priority'")
    return list(priorities)


def _check_prompt(number: int, prompt: Any) -> None:
    if isinstance(prompt, Mapping):
        # An empty prompt is refused as one, later; other keys may ask for nothing.
        keys = {
            key
            for key, value in prompt.items()
            if not asks_for_nothing(value) or (key in _KEYS and value is not None)
        }
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
