"""What a user gets back, with the names of vLLM's outputs."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from engine.pooling import Vector


@dataclass(slots=True)
class Logprob:
    """One token's log-probability at one position; rank 1 is the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One completion. ``finish_reason`` is stop, length, abort or error; None while it runs.

    ``stop_reason`` is the stop string or stop token id that ended it, if one did.
    ``logprobs`` has a dict for each output token: the token's own and the likeliest ones.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of ``time.monotonic``, None where it has not come to that, and counts.

    ``num_cached_tokens`` are the prompt's tokens that the prefix cache had.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    preempted_at: tuple[float, ...] = ()  # of all its completions

    @property
    def num_preemptions(self) -> int:
        return len(self.preempted_at)

    @property
    def time_to_first_token(self) -> float | None:
        first = self.first_token_time
        return None if first is None else first - self.arrival_time

    @property
    def time_in_queue(self) -> float | None:
        first = self.first_scheduled_time
        return None if first is None else first - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions, in the order of their indices.

    ``vector``: the prompt's, raw, of a request that pools.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    vector: "Vector | None" = None

    @property
    def num_cached_tokens(self) -> int:
        return self.metrics.num_cached_tokens

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


class Piece(msgspec.Struct, frozen=True):
    """What a stream brings for one completion: new text, its tokens, and at the end why it ended.

    ``text`` may be empty while a character or a stop string could still be incomplete.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
