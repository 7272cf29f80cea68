"""The errors of manta.

    MantaError
    ├── ConfigError        (ValueError)  an option is unknown, wrong, or contradicts another
    ├── CheckpointError    (ValueError)  a checkpoint folder or file cannot be used
    ├── RequestError       (ValueError)  one request is wrong or could never be served
    │   ├── PromptTooLong                its tokens do not fit the model or the KV cache
    │   └── QueueFull                    too many requests wait already
    └── EngineError        (RuntimeError) the engine itself failed
        └── Unavailable                  no engine takes requests now

What a user did wrong is also a ``ValueError``. An error inside one running request (NaN logits)
is not raised: the request ends with ``finish_reason="error"`` and the engine goes on.
"""

import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlevel = 3


def shown(value: object) -> str:
    """A value as an error shows it: its ``repr``, but short and not deep, whatever its size."""
    return _short.repr(value)


class MantaError(Exception):
    """Base of every error that manta raises on purpose."""


class ConfigError(MantaError, ValueError):
    """A wrong engine option; the message names the option and what is allowed."""


class CheckpointError(MantaError, ValueError):
    """A checkpoint that cannot be loaded; the message names the file or tensor."""


class RequestError(MantaError, ValueError):
    """A wrong request; the message names the field and what is allowed."""


class PromptTooLong(RequestError):
    """A request whose tokens can never fit the model's length or the KV cache."""


class QueueFull(RequestError):
    """A request refused because the queue is full; it may be sent again later."""


class EngineError(MantaError, RuntimeError):
    """The engine cannot go on."""


class Unavailable(EngineError):
    """No engine takes requests now. ``code`` is starting, or draining; ``model``, if given, is the
    one that has none."""

    def __init__(self, message: str, code: str, model: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.model = model
