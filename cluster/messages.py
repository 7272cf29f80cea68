"""What an engine and its clients say to each other.

Arrays on the wire, not maps: a step's tokens for one client are three lists of integers in one
``Update``. Only what is no plain token (log-probabilities, an end) takes a record of its own.
A request that a client calls ``number`` has its completions under that and the next numbers.
"""

import msgspec

from cluster.client import EngineInfo, EngineLoad
from engine.continuation import Continuation
from engine.outcome import Outcome
from engine.stats import Metric


class Submit(msgspec.Struct, array_like=True, tag=1):
    """Queue a request; ``number`` is the client's name for it."""

    number: int
    request: Continuation


class StopAtText(msgspec.Struct, array_like=True, tag=2):
    """The text of one completion reached a stop string."""

    number: int
    index: int


class Cancel(msgspec.Struct, array_like=True, tag=3):
    """End a request now."""

    number: int


class Drain(msgspec.Struct, array_like=True, tag=4):
    """Admit nothing any longer; what is queued or runs goes on elsewhere or, where nobody takes
    it, to its end. ``leave``: the engine's process ends then."""

    leave: bool = False


class EndRequests(msgspec.Struct, array_like=True, tag=6):
    """End every request, of every client, with an error for this cause."""

    cause: str


class Ask(msgspec.Struct, array_like=True, tag=5):
    """Send the engine's metrics; ``number`` is the client's name for the question."""

    number: int


Command = Submit | StopAtText | Cancel | Drain | EndRequests | Ask


class Times(msgspec.Struct, array_like=True):
    """A request's metrics; times in seconds since its arrival, as clocks of hosts differ."""

    number: int
    queued: float | None
    first_token: float | None
    finished: float | None
    cached_tokens: int
    preemptions: list[float]


class Refused(msgspec.Struct, array_like=True):
    """A request that was not queued: the name of the error of ``engine.errors`` and its text."""

    number: int
    error: str
    message: str


class Greeting(msgspec.Struct, array_like=True, tag=1):
    """The first message of an engine to a client."""

    info: EngineInfo
    load: EngineLoad


class Update(msgspec.Struct, array_like=True, tag=2):
    """All that a step, or the commands before it, brought for one client.

    ``completions``, ``positions`` and ``tokens``: the next token of each of these completions.
    ``outcomes``: what is more than that, by the number of the request.
    ``begun``: requests that the next step runs, which this engine has not run before.
    ``ended``: the client's requests have ended for this cause, and are not to be tried elsewhere.
    ``failure``: the engine cannot go on; nothing follows.
    """

    completions: list[int] = []
    positions: list[int] = []
    tokens: list[int] = []
    outcomes: list[tuple[int, Outcome]] = []
    accepted: list[int] = []
    begun: list[int] = []
    refused: list[Refused] = []
    times: list[Times] = []
    answers: list[tuple[int, list[Metric]]] = []
    load: EngineLoad | None = None
    ended: str | None = None
    failure: str | None = None


class AtWork(msgspec.Struct, array_like=True, tag=3):
    """A step keeps the engine from saying more: it has been running for so long."""

    step_seconds: float


Report = Greeting | Update | AtWork
