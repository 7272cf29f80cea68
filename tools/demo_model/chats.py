"""Chats as the chat template renders them, and their parts: what all the new documents share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from blocks import corpus
from talk import chain

from engine.templates import compiled

CHAT_TEMPLATE = (Path(__file__).parent / "template.jinja").read_text(encoding="utf-8")
TAGS = [
    "<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
]  # fmt: skip
ANSWERS = "<|im_start|>assistant\n"

Message = dict[str, Any]


def rendered(messages: list[Message], tools: list[dict[str, Any]] | None = None,
             **variables: Any) -> str:  # fmt: skip
    """The chat in the template's text; with ``add_generation_prompt`` it is a prompt."""
    template, _ = compiled(CHAT_TEMPLATE)
    return template.render(messages=messages, tools=tools or None, **variables)


def system(rng: random.Random, share: float) -> list[Message]:
    """A system message, or none."""
    if rng.random() > share:
        return []
    return [{"role": "system", "content": rng.choice(corpus().lists["system"])}]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(content: str, thought: str = "", calls: list[Any] | None = None) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def turns(length: int, rng: random.Random) -> list[Message]:
    """So many questions and answers of the text files."""
    return [m for asked, said in chain(length, rng) for m in (user(asked), assistant(said))]
