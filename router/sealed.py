"""Thinking that a client keeps for us without seeing it, as it has to come back."""

import base64
import binascii

_MARK = "manta1:"


def seal(text: str) -> str:
    """``text`` in a form that goes through clients as it is. It is encoded, not encrypted: it is
    the model's own thinking, which the client may see."""
    return _MARK + base64.b64encode(text.encode()).decode()


def unseal(sealed: str) -> str:
    """The text. Raises ValueError for what ``seal`` has not made."""
    if not sealed.startswith(_MARK):
        raise ValueError("it was not made by this server")
    try:
        return base64.b64decode(sealed.removeprefix(_MARK), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError("it was not made by this server, or was changed") from None
