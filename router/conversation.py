"""A chat's messages, made of what other protocols call items and blocks."""

import json
from collections.abc import Mapping
from typing import Any

from router.errors import wrong_at

Message = dict[str, Any]


class Conversation:
    """Collects ``messages``: what the assistant thinks, says and calls in one turn is one message.

    A tool's result has the name of the tool, for templates that show it.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._names: dict[str, str] = {}  # of tools, by the ids of their calls
        self._answers = False  # the last message is an assistant's turn that goes on

    def say(self, role: str, content: str | list[Message]) -> None:
        """A message of anybody but the assistant."""
        self._answers = False
        self.messages.append({"role": role, "content": content})

    def think(self, text: str) -> None:
        """What the assistant thought before what follows."""
        turn = self._turn(new="content" in self._last() or "tool_calls" in self._last())
        turn["reasoning"] = turn.get("reasoning", "") + text

    def answer(self, text: str) -> None:
        """What the assistant said."""
        turn = self._turn(new="tool_calls" in self._last())
        turn["content"] = turn.get("content", "") + text

    def call(self, id: str, name: str, arguments: str) -> None:
        """A call by the assistant; ``arguments`` is a JSON object."""
        self._names[id] = name
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._turn().setdefault("tool_calls", []).append(call)

    def result(self, id: str, content: str | list[Message]) -> None:
        """What a call gave."""
        self.say("tool", content)
        self.messages[-1]["tool_call_id"] = id
        if id in self._names:
            self.messages[-1]["name"] = self._names[id]

    def _last(self) -> Message:
        return self.messages[-1] if self._answers else {}

    def _turn(self, new: bool = False) -> Message:
        if new or not self._answers:
            self.messages.append({"role": "assistant"})
            self._answers = True
        return self.messages[-1]


def as_arguments(values: Any) -> str:
    """The arguments of a call as text."""
    return json.dumps(values, ensure_ascii=False)


def string_of(where: str, part: Mapping[str, Any], name: str) -> str:
    """An entry of an item or a block, which must be a string. Raises ApiError, naming it."""
    value = part.get(name)
    if not isinstance(value, str):
        raise wrong_at(f"{where}.{name}", "must be a string")
    return value
