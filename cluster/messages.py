"""What an engine and its clients say to each other.

Arrays on the wire, not maps: a step's tokens for one client are two lists of integers in one
``Batch``. Only what is no plain token (log-probabilities, an end, another completion than the
first) takes a record of its own.
"""

import msgspec

from cluster.client import EngineInfo, EngineLoad
from engine.plan import TokenLogprobs
from engine.request import Request
from engine.sequence import FinishReason
from engine.stats import Metric


class Submit(msgspec.Struct, array_like=True, tag=1):
    """Queue a request; ``number`` is the client's name for it."""

    number: int
    request: Request


class StopAtText(msgspec.Struct, array_like=True, tag=2):
    """The text of one completion reached a stop string."""

    number: int
    index: int


class Cancel(msgspec.Struct, array_like=True, tag=3):
    """End a request now."""

    number: int


class Drain(msgspec.Struct, array_like=True, tag=4):
    """Admit nothing any longer; what is queued or runs goes on to its end."""


class EndRequests(msgspec.Struct, array_like=True, tag=6):
    """End every request, of every client, with an error for this cause."""

    cause: str


class Ask(msgspec.Struct, array_like=True, tag=5):
    """Send the engine's metrics; ``number`` is the client's name for the question."""

    number: int


Command = Submit | StopAtText | Cancel | Drain | EndRequests | Ask


class Entry(msgspec.Struct, array_like=True):
    """A ``Delta`` of a request that is more than a plain token."""

    number: int
    index: int
    token: int | None
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[int, list[TokenLogprobs]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class Times(msgspec.Struct, array_like=True):
    """A request's metrics; times in seconds since its arrival, as clocks of hosts differ."""

    number: int
    queued: float | None
    first_token: float | None
    finished: float | None
    cached_tokens: int
    preemptions: int


class Refused(msgspec.Struct, array_like=True):
    """A request that was not queued: the name of the error of ``engine.errors`` and its text."""

    number: int
    error: str
    message: str


class Hello(msgspec.Struct, array_like=True, tag=1):
    """The first message of an engine to a client."""

    info: EngineInfo
    load: EngineLoad


class Batch(msgspec.Struct, array_like=True, tag=2):
    """All that a step, or the commands before it, brought for one client.

    ``numbers`` and ``tokens``: the next token of the first completion of each of these requests.
    ``failure``: the client's requests have ended, for this cause; nothing follows. An engine that
    goes on can be connected to again.
    """

    numbers: list[int] = []
    tokens: list[int] = []
    entries: list[Entry] = []
    accepted: list[int] = []
    refused: list[Refused] = []
    times: list[Times] = []
    answers: list[tuple[int, list[Metric]]] = []
    load: EngineLoad | None = None
    failure: str | None = None


class AtWork(msgspec.Struct, array_like=True, tag=3):
    """A step keeps the engine from saying more: it has been running for so long."""

    step_seconds: float


Message = Hello | Batch | AtWork
