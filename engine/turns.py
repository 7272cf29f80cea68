"""Whose turn each message of a chat is, as a chat template takes it.

OpenAI's and Anthropic's APIs let messages of the system and of a developer stand anywhere, and two
of a user's follow each other. Many templates take a system message at the beginning only, or turns
that alternate; there what was said goes where the template shows it.
"""

import functools
from typing import Any

from engine.forms import WORDS, content_as, content_taken, rendered

Message = dict[str, Any]
SYSTEM = ("system", "developer")


def settled(messages: list[Message], template: str, with_tools: bool) -> list[Message]:
    """Checked messages, each in a role and a place in which ``template`` shows it.

    A developer is the system, where the template passes over developers. Where it takes one system
    message, further ones at the beginning are joined to it; later ones, where it takes none, are
    the user's. Where it does not take two turns of the user's, they are one.
    """
    roles = [_role(message["role"], template, with_tools) for message in messages]
    first = next((i for i, role in enumerate(roles) if role not in SYSTEM), len(roles))
    shown: list[Message] = []
    moved = False  # the last one shown has what was a system message
    for at, (message, role) in enumerate(zip(messages, roles, strict=True)):
        moves = role in SYSTEM and at > first and not _takes_later(template, role)
        message = {**message, "role": "user" if moves else role}
        if shown and _joins(shown[-1]["role"], message["role"], moves or moved, template):
            shown[-1]["content"] = _joined(shown[-1].get("content", ""), message.get("content", ""))
            moved = moved or moves
        else:
            shown.append(message)
            moved = moves
    return shown


def _role(role: str, template: str, with_tools: bool) -> str:
    if role == "developer" and not any(content_taken(template, role, with_tools)):
        return "system"  # OpenAI's newer name for it
    return role


def _joins(before: str, role: str, moved: bool, template: str) -> bool:
    if before in SYSTEM and role in SYSTEM:
        return not _takes(template, role)
    return before == role == "user" and (moved or not _takes(template, role))


def _joined(before: Any, content: Any) -> Any:
    if isinstance(before, str) and isinstance(content, str):
        return f"{before}\n\n{content}"
    return [*_parts(before), *_parts(content)]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _said(template: str, role: str, word: str) -> Message:
    takes = content_taken(template, role, False)
    return {"role": role, "content": content_as(word, takes, "auto")}


@functools.lru_cache(maxsize=256)
def _takes(template: str, role: str) -> bool:
    """Whether ``template`` shows two messages of this role that begin a chat."""
    chat = [_said(template, role, word) for word in WORDS]
    return _shows(template, chat if role == "user" else [*chat, _said(template, "user", "Hello")])


@functools.lru_cache(maxsize=256)
def _takes_later(template: str, role: str) -> bool:
    """Whether ``template`` shows a message of this role after a user's and after an answer."""
    before, after = (_said(template, role, word) for word in WORDS)
    user, answer = (_said(template, *said) for said in (("user", "Hello"), ("assistant", "Hi")))
    chats = ([before, user, after], [before, user, answer, after, user])
    return all(_shows(template, chat) for chat in chats)


def _shows(template: str, chat: list[Message]) -> bool:
    text = rendered(template, chat, False)
    return -1 < text.find(WORDS[0]) < text.find(WORDS[1])
