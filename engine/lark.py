"""Lark's notation, as llguidance extends it."""

import json
import re

from engine.errors import RequestError

MOST_CHARACTERS = 1 << 18  # of a grammar
# Attributes of rules that would have no effect here, or need tokens to be taken back.
_ATTRIBUTES = re.compile(r"^\s*[?!]?[\w-]+\[[^\]\n]*\b(temperature|max_tokens|stop)\s*=", re.M)
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


def check_attributes(grammar: str) -> None:
    """Raise RequestError for an attribute of a rule that is not supported."""
    if found := _ATTRIBUTES.search(grammar[:MOST_CHARACTERS]):
        raise RequestError(f"the attribute {found[1]} of a rule is not supported")


def as_lark(grammar: str) -> str:
    """A grammar in Lark's notation or in GBNF. Raises RequestError."""
    if not _GBNF.search(grammar):
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # it raises anything
        raise RequestError(f"no GBNF: {' '.join(str(error).split())[:300]}") from None


def regex_terminal(regex: str) -> str:
    """A regular expression between slashes."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", regex) + "/"


def quoted(text: str) -> str:
    """A literal: JSON's way of writing strings, and no control characters."""
    written = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", written)
