"""From a request of /v1/responses to the chat that it asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.values import asks_for_nothing
from router.conversation import Conversation, string_of
from router.errors import wrong, wrong_at
from router.responses_schema import ResponsesRequest, TextFormat
from router.responses_tools import OfferedTools, chat_name, chosen, custom_arguments, offered
from router.schema import ChatRequest, JsonSchema, ResponseFormat
from router.sealed import unseal

_STATELESS = {
    "previous_response_id": "send all items of the conversation as input",
    "conversation": "send all items of the conversation as input",
    "prompt": "send its text as instructions and input",
    "background": "wait for the answer, or stream it",
}
_TEXTS = ("input_text", "output_text", "text")
_ROLES = ("user", "assistant", "system", "developer")


@dataclass(frozen=True)
class AskedResponse:
    """The chat that a request asks for, and its tools."""

    chat: ChatRequest
    tools: OfferedTools


def asked_of(body: ResponsesRequest, strict_tools: bool) -> AskedResponse:
    """What a request asks for. strict_tools: tools that are not here are refused.

    Raises ApiError, naming the field or item and what is allowed.
    """
    for name, instead in _STATELESS.items():
        if getattr(body, name) is not False and not asks_for_nothing(getattr(body, name)):
            message = f"{name} is not supported: this server keeps nothing of a request; {instead}"
            raise wrong(message, name, "unsupported_value")
    tools = offered(body.tools, strict_tools)
    choice, left = chosen(body.tool_choice, tools)
    chat = ChatRequest(
        model=body.model,
        messages=_messages(body),
        tools=left,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        thinking_token_budget=body.thinking_token_budget,
        response_format=_format(body.text.format if body.text else None),
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        logprobs=bool(body.top_logprobs) or "message.output_text.logprobs" in (body.include or ()),
        top_logprobs=body.top_logprobs,
        stream=body.stream,
        chat_template_kwargs=body.chat_template_kwargs,
        priority=body.priority,
        request_id=body.request_id,
    )
    return AskedResponse(chat, tools)


def _format(form: TextFormat | None) -> ResponseFormat | None:
    if form is None or form.type in (None, "text"):
        return None
    if form.type == "json_object":
        return ResponseFormat(type="json_object")
    if form.definition is None:
        raise wrong("text.format must have a schema, as its type is json_schema", "text.format")
    return ResponseFormat(
        type="json_schema", json_schema=JsonSchema(name=form.name, definition=form.definition)
    )


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    conversation = Conversation()
    if body.instructions:
        conversation.say("system", body.instructions)
    if isinstance(body.input, str):
        conversation.say("user", body.input)
        return conversation.messages
    for i, item in enumerate(body.input):
        _add(conversation, f"input[{i}]", item)
    if not conversation.messages:
        raise wrong("input must have at least one item, or there must be instructions", "input")
    return conversation.messages


def _add(conversation: Conversation, where: str, item: Mapping[str, Any]) -> None:
    """Add what an item says. Its further entries, ``id`` and ``status`` for instance, say nothing
    to a model."""
    match item.get("type") or ("message" if "role" in item else "item_reference"):
        case "message":
            _add_message(conversation, where, item)
        case "reasoning":
            conversation.think(_thought(where, item))
        case "function_call":
            name = chat_name(string_of(where, item, "name"), item.get("namespace"))
            arguments = string_of(where, item, "arguments")
            conversation.call(string_of(where, item, "call_id"), name, arguments or "{}")
        case "custom_tool_call":
            name = chat_name(string_of(where, item, "name"), item.get("namespace"))
            arguments = custom_arguments(string_of(where, item, "input"))
            conversation.call(string_of(where, item, "call_id"), name, arguments)
        case "function_call_output" | "custom_tool_call_output":
            output = _content(f"{where}.output", item.get("output"))
            conversation.result(string_of(where, item, "call_id"), output)
        case "item_reference":
            message = "this server keeps no items; send it whole, as clients do with store false"
            raise wrong_at(where, f"item_reference is not supported: {message}")
        case other:
            known = "message, reasoning, function_call, function_call_output, custom_tool_call"
            known += " or custom_tool_call_output"
            raise wrong_at(f"{where}.type", f"must be {known}, got {str(other)[:100]!r}")


def _add_message(conversation: Conversation, where: str, item: Mapping[str, Any]) -> None:
    role, content = item.get("role"), _content(f"{where}.content", item.get("content"))
    if role not in _ROLES:
        raise wrong_at(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
    if role == "assistant":
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        conversation.answer("".join(texts))
    else:
        conversation.say(role, content)


def _content(where: str, content: Any) -> str | list[dict[str, Any]]:
    """A string, or text parts as a chat has them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_at(where, "must be a string or a list of parts")
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in (*_TEXTS, "refusal"):
            raise wrong_at(
                f"{where}[{i}]", f"must be text, as {_TEXTS[0]} for instance; got {kind}"
            )
        text = string_of(f"{where}[{i}]", part, "refusal" if kind == "refusal" else "text")
        parts.append({"type": "text", "text": text})
    return parts or ""


def _thought(where: str, item: Mapping[str, Any]) -> str:
    """The text of a reasoning item: its content, else what is sealed in it, else its summary."""
    if item.get("content"):
        return _texts(f"{where}.content", item["content"])
    if sealed := item.get("encrypted_content"):
        try:
            return unseal(str(sealed))
        except ValueError as error:
            where = f"{where}.encrypted_content"
            raise wrong(f"{where}: {error}", where, "invalid_encrypted_content") from None
    return _texts(f"{where}.summary", item.get("summary") or [])


def _texts(where: str, parts: Any) -> str:
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise wrong_at(where, "must be a list of parts")
    return "\n\n".join(string_of(f"{where}[{i}]", part, "text") for i, part in enumerate(parts))
