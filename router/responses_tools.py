"""The tools of /v1/responses as those of a chat, and the model's calls of them as items."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.conversation import as_arguments
from router.errors import ApiError, wrong, wrong_at
from router.hosted import pass_over

INPUT = "input"  # the one argument of a custom tool
_CUSTOM = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}
_SHOWN = ("description", "parameters", "strict")  # of a function, to the model


@dataclass(frozen=True)
class CalledTool:
    """What a call's name in the chat means. ``custom``: it takes text instead of arguments."""

    name: str
    custom: bool = False
    namespace: str | None = None


@dataclass(frozen=True)
class OfferedTools:
    """The tools as a chat has them, and what their names there mean."""

    tools: list[dict[str, Any]]
    by_name: Mapping[str, CalledTool]

    def called(self, name: str) -> CalledTool:
        """The tool that the model means by ``name``, offered or not."""
        return self.by_name.get(name, CalledTool(name))


def chat_name(name: str, namespace: str | None) -> str:
    """The name of a tool in the chat, where there are no namespaces."""
    return f"{namespace}__{name}" if namespace else name


def offered(given: Sequence[Mapping[str, Any]] | None, strict: bool) -> OfferedTools:
    """The functions and custom tools among ``given``; the others are passed over, or refused if
    ``strict``.

    Raises ApiError, naming the tool.
    """
    tools: list[dict[str, Any]] = []
    meant: dict[str, CalledTool] = {}

    def add(where: str, tool: Any, namespace: str | None) -> None:
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if not isinstance(kind, str):
            raise wrong(f"{where}.type must be a string: function, custom or namespace", where)
        if kind not in ("function", "custom", "namespace"):
            pass_over(where, kind, strict)
            return
        name = tool.get("name")
        if not isinstance(name, str) or not name:
            raise wrong_at(f"{where}.name", "must be a string")
        if kind == "namespace":
            inner = tool.get("tools")
            if namespace is not None or not isinstance(inner, list):
                raise wrong(f"{where}.tools must be a list of functions and custom tools", where)
            for i, one in enumerate(inner):
                add(f"{where}.tools[{i}]", one, name)
            return
        full = chat_name(name, namespace)
        if full in meant:
            raise wrong(f"{where}: there are two tools of the name {full!r}", f"{where}.name")
        function = _custom(where, tool) if kind == "custom" else _function(tool)
        tools.append({"type": "function", "function": {"name": full, **function}})
        meant[full] = CalledTool(name, kind == "custom", namespace)

    for i, tool in enumerate(given or ()):
        add(f"tools[{i}]", tool, None)
    return OfferedTools(tools, meant)


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tool[k] for k in _SHOWN if tool.get(k) is not None}


def _custom(where: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool that takes text, as a function that takes one string."""
    form = tool.get("format")
    described = str(tool.get("description") or "")
    if isinstance(form, Mapping) and form.get("type") == "grammar":
        described += f"\n\nThe input must match this grammar ({form.get('syntax')}):\n"
        described += str(form.get("definition"))
    elif form is not None and not (isinstance(form, Mapping) and form.get("type") == "text"):
        raise wrong_at(f"{where}.format", "must be of type text or grammar")
    return {"description": described.strip(), "parameters": _CUSTOM}


def custom_input(arguments: str) -> str:
    """The text that a custom tool is called with; all of the arguments if there is none."""
    values = json.loads(arguments)
    text = values.get(INPUT) if isinstance(values, dict) else None
    return text if isinstance(text, str) else arguments


def custom_arguments(text: str) -> str:
    """The arguments of the function that stands for a custom tool."""
    return as_arguments({INPUT: text})


def chosen(choice: str | Mapping[str, Any] | None, tools: OfferedTools) -> tuple[Any, list[Any]]:
    """``tool_choice`` of a chat, and the tools that it leaves.

    Raises ApiError for a choice that is none.
    """
    if not isinstance(choice, Mapping):
        return choice, tools.tools
    kind = choice.get("type")
    if kind in ("function", "custom"):
        name = chat_name(str(choice.get("name")), choice.get("namespace"))
        return {"type": "function", "function": {"name": name}}, tools.tools
    if kind == "allowed_tools" and isinstance(choice.get("tools"), list):
        allowed = {
            chat_name(str(one.get("name")), one.get("namespace"))
            for one in choice["tools"]
            if isinstance(one, Mapping)
        }
        if unknown := allowed - tools.by_name.keys():
            raise _wrong_choice(f"tools has none of the name {min(unknown)!r}")
        left = [tool for tool in tools.tools if tool["function"]["name"] in allowed]
        return choice.get("mode") or "auto", left
    raise _wrong_choice(
        "it must be none, auto, required, a function, a custom tool or allowed_tools"
    )


def _wrong_choice(what: str) -> ApiError:
    return wrong(f"tool_choice: {what}", "tool_choice")
