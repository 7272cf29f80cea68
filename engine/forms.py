"""In which form a chat template takes what messages hold, found by rendering small chats with it.

Templates differ: most take a message's content as a string, those of models that see images go
over its parts, some do either by what they get; the arguments of a tool call are an object to most
and a string of JSON to some. Nothing in a checkpoint says so, and reading it off the source misses
what happens in macros. But who is given the wrong form leaves the words out, or fails.
"""

import functools
import json
import re
from typing import Any, NamedTuple

from engine.templates import compiled

ALL = 1 << 30
WORDS = ("alphaword", "betaword")
_ARGUMENTS = {"at": "gammaword"}
_DUMPED = re.compile(rf"""["']text["']\s*:\s*["']{WORDS[0]}""")  # a list of parts printed as it is
_USER: dict[str, Any] = {"role": "user", "content": "Hello"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at it.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
_SPECIAL = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "sep", "cls")}
_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")


class Takes(NamedTuple):
    """What of a message's content is shown: whether one that is a string, and of a list how many
    parts (0, 1 or ``ALL``)."""

    string: bool
    parts: int


class Calls(NamedTuple):
    """How an assistant's tool calls are shown: whether with arguments as objects, else as JSON in
    strings, and whether without content, else with an empty one."""

    objects: bool
    no_content: bool


def content_as(content: Any, takes: Takes, wanted: str) -> Any:
    """Checked content, a string or a list of text parts, as the template takes it.

    Under "auto" as it is, if the template shows all of it so, as transformers would pass it; else a
    string as one part, or parts as one string, joined by newlines as in vLLM.
    """
    automatic = wanted == "auto" and takes.parts > 0
    if not isinstance(content, str):
        if wanted == "openai" or (automatic and len(content) <= takes.parts):
            return content
        content = "\n".join(part["text"] for part in content)
    as_part = wanted == "openai" or (automatic and not takes.string)
    return [_part(content)] if as_part else content


def content_taken(template: str, role: str, with_tools: bool) -> Takes:
    """What ``template`` takes as the content of ``role``'s messages."""
    return _content_taken(template, role if role in _ROLES else "user", with_tools)


@functools.lru_cache(maxsize=256)
def _content_taken(template: str, role: str, with_tools: bool) -> Takes:
    def shows(content: Any, words: tuple[str, ...]) -> bool:
        message = {"role": role, "content": content}
        chat = [message, _USER] if role in ("system", "developer") else [message]
        if role == "assistant":
            chat = [_USER, message, _USER]
        elif role in ("tool", "ipython", "function"):
            calls = calls_taken(template, with_tools)
            named = {"name": "look", "tool_call_id": "abcdefghi"}
            chat = [_USER, _called(calls), message | named, _USER]
        text = rendered(template, chat, with_tools)
        places = [text.find(word) for word in words]
        return -1 not in places and places == sorted(places) and not _DUMPED.search(text)

    parts = [_part(word) for word in WORDS]
    most = ALL if shows(parts, WORDS) else int(shows(parts[:1], WORDS[:1]))
    return Takes(shows(" ".join(WORDS), WORDS), most)


@functools.lru_cache(maxsize=64)
def calls_taken(template: str, with_tools: bool) -> Calls:
    """How ``template`` takes an assistant's tool calls: as objects and without content, as
    transformers passes them, unless it shows them in another way only."""
    for calls in (Calls(True, True), Calls(True, False), Calls(False, True), Calls(False, False)):
        text = rendered(template, [_USER, _called(calls), _USER], with_tools)
        if _ARGUMENTS["at"] in text:
            return calls
    return Calls(True, True)


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _called(calls: Calls) -> dict[str, Any]:
    """An assistant's message that calls a tool."""
    arguments = _ARGUMENTS if calls.objects else json.dumps(_ARGUMENTS)
    function = {"name": "look", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}  # Mistral's have 9
    message = {"role": "assistant", "tool_calls": [call]}
    return message if calls.no_content else message | {"content": ""}


def rendered(template: str, messages: list[dict[str, Any]], with_tools: bool) -> str:
    """The chat as ``template`` renders it; nothing if it will not."""
    try:
        return compiled(template)[0].render(
            **_SPECIAL,
            messages=messages,
            tools=[_TOOL] if with_tools else None,
            documents=None,
            add_generation_prompt=False,
        )
    except Exception:  # the template's own refusals, or what it cannot do with such a message
        return ""
