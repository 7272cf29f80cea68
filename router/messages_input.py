"""From a request of /v1/messages to the chat that it asks for."""

import hashlib
from collections.abc import Mapping
from typing import Any

from router.conversation import Conversation, as_arguments, string_of
from router.errors import wrong, wrong_at
from router.hosted import pass_over
from router.messages_schema import CountRequest, MessagesRequest, ToolChoice
from router.schema import ChatRequest, JsonSchema, ResponseFormat
from router.sealed import unseal

# A block that changes with every request, for the provider's accounts alone: it would keep the
# prefix cache from all that follows it.
_BILLING = "x-anthropic-billing-header:"
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
Text = str | list[dict[str, Any]]


def asked_of(body: CountRequest, model: str | None, strict_tools: bool) -> ChatRequest:
    """The chat that a request asks for, of a model. strict_tools: tools that are not here are
    refused.

    Raises ApiError, naming the field or block and what is allowed.
    """
    messages = _messages(body)
    final = messages[-1]
    goes_on = final["role"] == "assistant"
    if goes_on and (not final.get("content") or "tool_calls" in final):
        raise wrong("messages: the last one must be a user's, or text that goes on", "messages")
    chat = ChatRequest(
        model=model,
        messages=messages,
        tools=_tools(body.tools or [], strict_tools),
        continue_final_message=goes_on or None,
        **_choice(body.tool_choice),
        **_thinking(body),
    )
    if isinstance(body, MessagesRequest):
        chat.max_completion_tokens = body.max_tokens
        chat.stop = body.stop_sequences or None
        if body.thinking is not None and body.thinking.type != "disabled":
            chat.thinking_token_budget = body.thinking.budget_tokens
        chat.request_id, chat.priority = body.request_id, body.priority
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        chat.stream = body.stream
    return chat


def signature_of(thinking: str) -> str:
    """What stands where the provider's own models sign their thinking; nobody checks it."""
    return hashlib.sha256(thinking.encode()).hexdigest()


# ---- messages ----


def _messages(body: CountRequest) -> list[dict[str, Any]]:
    conversation = Conversation()
    system = _text("system", body.system) if body.system else ""
    if not isinstance(system, str):
        system = [part for part in system if not part["text"].startswith(_BILLING)]
    if system:
        conversation.say("system", system)
    for i, message in enumerate(body.messages):
        _add(conversation, f"messages[{i}]", message)
    return conversation.messages


def _add(conversation: Conversation, where: str, message: Mapping[str, Any]) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise wrong_at(f"{where}.role", "must be user, assistant or system")
    where = f"{where}.content"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise wrong_at(where, "must be a string or a list of blocks")
    if role == "assistant":
        if not content:
            conversation.answer("")
        for i, block in enumerate(content):
            _add_of_assistant(conversation, f"{where}[{i}]", block)
        return
    said = []
    for i, block in enumerate(content):
        if isinstance(block, Mapping) and block.get("type") == "tool_result" and role == "user":
            _add_result(conversation, f"{where}[{i}]", block)
        else:
            said.append(_part(f"{where}[{i}]", block))
    results = len(said) < len(content)
    if said or not results:
        conversation.say(role, said[0]["text"] if len(said) == 1 else said or "")


def _add_of_assistant(conversation: Conversation, where: str, block: Any) -> None:
    kind = block.get("type") if isinstance(block, Mapping) else None
    match kind:
        case "text":
            conversation.answer(string_of(where, block, "text"))
        case "thinking":
            conversation.think(_thought(where, block))
        case "redacted_thinking":
            conversation.think(_unsealed(f"{where}.data", block.get("data")))
        case "tool_use":
            values = block.get("input")
            if not isinstance(values, Mapping):
                raise wrong_at(f"{where}.input", "must be an object")
            id, name = string_of(where, block, "id"), string_of(where, block, "name")
            conversation.call(id, name, as_arguments(values))
        case _:
            raise wrong_at(
                f"{where}.type",
                f"must be text, thinking, redacted_thinking or tool_use, got {kind!r}",
            )


def _thought(where: str, block: Mapping[str, Any]) -> str:
    """The text of a block of thinking, which is in its signature where the text was omitted."""
    text = string_of(where, block, "thinking")
    return text or _unsealed(f"{where}.signature", block.get("signature"))


def _unsealed(where: str, sealed: Any) -> str:
    try:
        return unseal(str(sealed))
    except ValueError as error:
        raise wrong(f"{where}: {error}", where) from None


def _add_result(conversation: Conversation, where: str, block: Mapping[str, Any]) -> None:
    content = _text(f"{where}.content", block.get("content") or "")
    if block.get("is_error"):  # a chat's tool messages have no such mark
        mark = "Error: "
        content = mark + content if isinstance(content, str) else [_as_part(mark), *content]
    conversation.result(string_of(where, block, "tool_use_id"), content)


def _text(where: str, content: Any) -> Text:
    """A string, or blocks of text as parts of a chat's message."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_at(where, "must be a string or a list of blocks")
    return [_part(f"{where}[{i}]", block) for i, block in enumerate(content)]


def _part(where: str, block: Any) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind != "text":
        raise wrong_at(f"{where}.type", f"must be text here, got {kind!r}")
    return _as_part(string_of(where, block, "text"))


def _as_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


# ---- tools and thinking ----


def _tools(tools: list[dict[str, Any]], strict: bool) -> list[dict[str, Any]]:
    shown = []
    for i, tool in enumerate(tools):
        where, kind = f"tools[{i}]", tool.get("type") or "custom"
        if kind != "custom":
            pass_over(where, str(kind), strict)
            continue
        function = {"name": string_of(where, tool, "name")}
        for name, ours in (("description", "description"), ("input_schema", "parameters")):
            if tool.get(name) is not None:
                function[ours] = tool[name]
        if tool.get("strict") is not None:
            function["strict"] = tool["strict"]
        shown.append({"type": "function", "function": function})
    return shown


def _choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    if (choice.type == "tool") != (choice.name is not None):
        raise wrong(
            "tool_choice must have a name if its type is tool, and only then", "tool_choice"
        )
    named = {"type": "function", "function": {"name": choice.name}}
    return {
        "tool_choice": _CHOICES.get(choice.type, named),
        "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
    }


def _thinking(body: CountRequest) -> dict[str, Any]:
    """Without ``thinking`` there is none, as that API has it. The variables are those of the
    templates of Qwen, GLM and DeepSeek."""
    thinks = body.thinking is not None and body.thinking.type != "disabled"
    options = body.output_config
    fields: dict[str, Any] = {
        "chat_template_kwargs": {"enable_thinking": thinks, "thinking": thinks}
    }
    if options and options.effort and thinks:
        fields["reasoning_effort"] = options.effort
    if options and options.format:
        schema = JsonSchema(definition=options.format.definition)
        fields["response_format"] = ResponseFormat(type="json_schema", json_schema=schema)
    return fields
