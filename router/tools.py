"""What a chat asks for of tools, checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.values import asks_for_nothing
from router.errors import wrong, wrong_at
from router.schema import ChatRequest

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_MODES = ("none", "auto", "required")


@dataclass(frozen=True)
class ToolUse:
    """The tools that the model is shown, and what it must do with them.

    forced: whether the answer must begin with a call; name: of which tool, if of one.
    most_calls: None is no bound. strict: whether a tool that may be called is strict.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    forced: bool = False
    name: str | None = None
    most_calls: int | None = None
    strict: bool = False


def tool_use(body: ChatRequest) -> ToolUse:
    """What ``tools``, ``tool_choice`` and ``parallel_tool_calls`` say together. Under "none" the
    model is shown no tools.

    Raises ApiError, naming the field.
    """
    tools = body.tools or []
    names = [_name(f"tools[{i}]", tool) for i, tool in enumerate(tools)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise wrong(f"tools has two functions of the name {twice[0]!r}", "tools")
    choice = body.tool_choice
    named = _choice(choice) if isinstance(choice, dict) else None
    if isinstance(choice, str) and choice not in _MODES:
        raise wrong(f"tool_choice must be {', '.join(_MODES)} or a function", "tool_choice")
    if choice == "none":
        return ToolUse()
    if named is not None and named not in names:
        raise wrong(f"tool_choice: tools has no function of the name {named!r}", "tool_choice")
    if choice == "required" and not tools:
        raise wrong("tool_choice 'required' needs tools", "tool_choice")
    one = named is not None or body.parallel_tool_calls is False
    return ToolUse(
        tools=tuple(tools),
        forced=named is not None or choice == "required",
        name=named,
        most_calls=1 if one else None,
        strict=any(
            tool["function"].get("strict") is True
            for name, tool in zip(names, tools, strict=True)
            if named in (None, name)
        ),
    )


def _choice(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    if choice.get("type") != "function" or not isinstance(function, Mapping):
        raise wrong(
            "tool_choice must be none, auto, required or"
            ' {"type": "function", "function": {"name": ...}}',
            "tool_choice",
        )
    return str(function.get("name"))


def _name(where: str, tool: Mapping[str, Any]) -> str:
    """The name of a tool. What else it has is for the chat template, which shows it."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise wrong_at(
            where, 'must be {"type": "function", "function": {...}}: there are no others'
        )
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong_at(f"{where}.function.name", "must be 1 to 128 letters, digits or any of _.:/-")
    parameters = function.get("parameters")
    if not asks_for_nothing(parameters) and not isinstance(parameters, Mapping):
        raise wrong_at(f"{where}.function.parameters", "must be a JSON schema, an object")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise wrong_at(f"{where}.function.description", "must be a string")
    if function.get("strict") not in (None, True, False):
        raise wrong_at(f"{where}.function.strict", "must be true or false")
    return name
