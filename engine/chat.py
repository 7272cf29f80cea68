"""Chats to prompts, by the Jinja templates that checkpoints bring (transformers' conventions)."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import jinja2

MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message")
_OPEN_END = "<|manta: the final message goes on here|> "


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
        _compile(value)
    except RequestError as error:
        raise ConfigError(str(error)) from None
    return value


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as a template takes them: text parts joined by newlines, tool calls' arguments
    as objects, fields that are None left out.

    Raises RequestError, naming the message and what is wrong with it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages must be a list of at least one message, got {messages!r}")
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _check_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {message!r}")
    clean = {key: value for key, value in message.items() if value is not None}
    if unknown := [key for key in clean if key not in MESSAGE_FIELDS]:
        allowed = ", ".join(MESSAGE_FIELDS)
        raise RequestError(f"{where} has {unknown[0]!r}; allowed are {allowed}")
    for field in ("role", "name", "tool_call_id", "reasoning_content"):
        if field in clean and not isinstance(clean[field], str):
            raise RequestError(f"{where}.{field} must be a string, got {clean[field]!r}")
    if not clean.get("role"):
        raise RequestError(f"{where} must have a role")
    if "tool_calls" in clean:
        clean["tool_calls"] = _tool_calls(f"{where}.tool_calls", clean["tool_calls"])
    if "content" in clean:
        clean["content"] = _text(f"{where}.content", clean["content"])
    elif "tool_calls" not in clean:
        raise RequestError(f"{where} must have content")
    return clean


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} must be a string or a list of parts, got {content!r}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text":
            raise RequestError(f"{where}[{i}] must be of type 'text' (only text), got {kind!r}")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise RequestError(f"{where}[{i}] must have a string 'text' and no more, got {part!r}")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """OpenAI's clients write a call's arguments as JSON in a string; templates take an object."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where} must be a list, got {calls!r}")
    clean = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}] must have a function with a name, got {call!r}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                wrong = f"{where}[{i}].function.arguments must be JSON: {error}"
                raise RequestError(wrong) from None
        clean.append({**call, "function": {**function, "arguments": arguments or {}}})
    return clean


def render(
    template: str,
    messages: Any,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    special_tokens: Mapping[str, str],
    template_kwargs: Mapping[str, Any],
) -> str:
    """The prompt that ``template`` makes of ``messages``; see ``Tokenizer.render_chat``."""
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "continue_final_message needs add_generation_prompt=False: either the final message"
            " goes on or a new one begins"
        )
    chat = check_messages(messages)
    compiled, variables = _compile(template)
    if wrong := [k for k in template_kwargs if k in _OWN_VARIABLES or k not in variables]:
        raise RequestError(f"the chat template takes no {wrong[0]!r}")
    if tools and "tools" not in variables:
        raise RequestError("tools: the chat template takes none")
    final = chat[-1].get("content", "")
    if continue_final_message:
        if not final.strip():
            raise RequestError("continue_final_message needs a final message with some content")
        chat[-1]["content"] = final + _OPEN_END
    try:
        prompt = compiled.render(
            **{"documents": None, **special_tokens, **template_kwargs},
            messages=chat,
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # the template's own refusals, or a message it does not foresee
        raise RequestError(f"the chat template refuses these messages: {error}") from error
    return _cut(prompt, final) if continue_final_message else prompt


def _cut(prompt: str, final: str) -> str:
    """The prompt up to the end of the final message, whose trailing space goes if the template
    strips messages."""
    mark = _OPEN_END.rstrip()
    at = prompt.rfind(mark)
    if at < 0 or final.strip() not in prompt:
        raise RequestError("continue_final_message: the chat template leaves out the final message")
    kept = prompt[at + len(mark) :].startswith(" ")
    return prompt[:at] if kept else prompt[:at].rstrip()


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> tuple["jinja2.Template", frozenset[str]]:
    """The compiled template and the variables that it reads."""
    import jinja2.ext
    import jinja2.meta

    try:
        environment = _environment()
        variables = jinja2.meta.find_undeclared_variables(environment.parse(template))
        return environment.from_string(template), frozenset(variables)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"chat_template, line {error.lineno}: {error.message}") from None


@functools.cache
def _environment() -> "jinja2.Environment":
    """Jinja as transformers sets it up; a sandbox, for templates come with checkpoints."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's text for training; here it is just its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return environment
