"""Chats to prompts, by the Jinja templates that checkpoints bring (transformers' conventions)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, RequestError
from engine.forms import calls_taken, content_as, content_taken
from engine.templates import compiled
from engine.turns import settled
from engine.values import asks_for_nothing

MESSAGE_FIELDS = (
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning",
)  # fmt: skip
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message")
_ARGUMENTS = (*_OWN_VARIABLES, "chat_template", "self")
_OPEN_END = "THE_FINAL_MESSAGE_GOES_ON_HERE "


def load_template(value: str) -> str:
    """The chat template that the option ``chat_template`` means: a file's content, or the value
    itself if it looks like a template.

    Raises ConfigError if it is neither, or no valid template.
    """
    if not any(mark in value for mark in "{\n"):
        try:
            value = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat_template must be a file that can be read, or a Jinja template: {error}"
            ) from None
    try:
        compiled(value)
    except RequestError as error:
        raise ConfigError(str(error)) from None
    return value


def check_variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variables that a caller adds to a chat template's own.

    Raises RequestError for one that is an argument of its own.
    """
    if wrong := [name for name in variables if name in _ARGUMENTS]:
        raise RequestError(f"chat_template_kwargs: {wrong[0]} is an argument of its own")
    return variables


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages, checked; ``reasoning`` is there under its older name too, as in vLLM. What asks
    for nothing is left out: fields that are None, as in transformers, and unknown ones that are
    empty.

    Raises RequestError, naming the message and what is wrong with it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages must be a list of at least one message, got {messages!r}")
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _check_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {message!r}")
    clean = {
        key: value
        for key, value in message.items()
        if value is not None and (key in MESSAGE_FIELDS or not asks_for_nothing(value))
    }
    if unknown := [key for key in clean if key not in MESSAGE_FIELDS]:
        allowed = ", ".join(MESSAGE_FIELDS)
        raise RequestError(f"{where} has {unknown[0]!r}; allowed are {allowed}")
    for field in ("role", "name", "tool_call_id", "reasoning_content", "reasoning"):
        if field in clean and not isinstance(clean[field], str):
            raise RequestError(f"{where}.{field} must be a string, got {clean[field]!r}")
    if not clean.get("role"):
        raise RequestError(f"{where} must have a role")
    if "tool_calls" in clean:
        clean["tool_calls"] = _tool_calls(f"{where}.tool_calls", clean["tool_calls"])
    if "content" in clean:
        clean["content"] = _content(f"{where}.content", clean["content"])
    elif clean["role"] == "assistant" and not clean.get("tool_calls"):
        clean["content"] = ""  # it said nothing
    elif "tool_calls" not in clean:
        raise RequestError(f"{where} must have content")
    if "reasoning" in clean:
        clean["reasoning_content"] = clean["reasoning"]
    return clean


def _content(where: str, content: Any) -> str | list[dict[str, str]]:
    """A string as it is, or a copy of the text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} must be a string or a list of parts, got {content!r}")
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text":
            raise RequestError(f"{where}[{i}] must be of type 'text' (only text), got {kind!r}")
        keys = {key for key in part if key == "text" or not asks_for_nothing(part[key])}
        if keys != {"type", "text"} or not isinstance(part["text"], str):
            raise RequestError(f"{where}[{i}] must have a string 'text' and no more, got {part!r}")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls whose arguments are an object, or a string of JSON as OpenAI's clients write them."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where} must be a list, got {calls!r}")
    clean = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}] must have a function with a name, got {call!r}")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                json.loads(arguments)
            except (ValueError, RecursionError) as error:
                wrong = f"{where}[{i}].function.arguments must be JSON: {error}"
                raise RequestError(wrong) from None
        clean.append({**call, "function": {**function, "arguments": arguments}})
    return clean


def _as_taken(
    template: str, message: dict[str, Any], with_tools: bool, content_format: str
) -> dict[str, Any]:
    """A checked message in the form in which the template takes it."""
    shown = dict(message)
    if "tool_calls" in message:
        calls = calls_taken(template, with_tools)
        shown["tool_calls"] = [_with_arguments(c, calls.objects) for c in message["tool_calls"]]
        if not calls.no_content:
            shown.setdefault("content", "")
    if "content" in message:
        takes = content_taken(template, shown["role"], with_tools)
        shown["content"] = content_as(message["content"], takes, content_format)
    if (reasoning := message.get("reasoning_content")) is not None:
        shown["thinking"] = reasoning  # as gpt-oss calls it
    return shown


def _with_arguments(call: Mapping[str, Any], as_object: bool) -> dict[str, Any]:
    """A checked tool call with its arguments as an object, or as a string of JSON."""
    arguments = call["function"]["arguments"]
    if as_object and isinstance(arguments, str):
        arguments = json.loads(arguments)
    elif not as_object and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def render(
    template: str,
    messages: Any,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    special_tokens: Mapping[str, str],
    template_kwargs: Mapping[str, Any],
    content_format: str = "auto",
) -> str:
    """The prompt that ``template`` makes of ``messages``; see ``Tokenizer.render_chat``."""
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "continue_final_message needs add_generation_prompt=False: either the final message"
            " goes on or a new one begins"
        )
    checked = check_messages(messages)
    runnable, variables = compiled(template)
    check_variables(template_kwargs)  # others that the template does not use have no effect
    for name, value in (("tools", tools), ("documents", template_kwargs.get("documents"))):
        if value and name not in variables:
            raise RequestError(f"{name}: the chat template takes none")
    placed = settled(checked, template, bool(tools))
    chat = [_as_taken(template, message, bool(tools), content_format) for message in placed]
    final = _open_end(chat[-1]) if continue_final_message else None
    try:
        prompt = runnable.render(
            **{"documents": None, **special_tokens, **template_kwargs},
            messages=chat,
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # the template's own refusals, or a message it does not foresee
        raise RequestError(f"the chat template refuses these messages: {error}") from error
    return prompt if final is None else _cut(prompt, final)


def _open_end(message: dict[str, Any]) -> str:
    """Mark the end of the final message, in its last part if it has parts; the text before that."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _OPEN_END
        return content
    if not content:
        raise RequestError("continue_final_message needs a final message with content")
    *before, last = content
    message["content"] = [*before, {**last, "text": last["text"] + _OPEN_END}]
    text: str = last["text"]
    return text


def _cut(prompt: str, final: str) -> str:
    """The prompt up to the end of the final message, whose trailing space goes if the template
    strips messages."""
    mark = _OPEN_END.rstrip()
    at = prompt.rfind(mark)
    if at < 0 or final.strip() not in prompt:
        raise RequestError("continue_final_message: the chat template leaves out the final message")
    kept = prompt[at + len(mark) :].startswith(" ")
    return prompt[:at] if kept else prompt[:at].rstrip()
