"""What comes of a continuation, from the engine to its client: one shape all the way.

Nearly all of it is one token of a completion and nothing else. A step's plain tokens stay columns
from the engine to the client's process; an ``Outcome`` is made where somebody reads it, and for
what is rare: an end, log-probabilities.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from engine.plan import TokenLogprobs
from engine.pooling import Vector
from engine.sequence import FinishReason, Sequence


class Outcome(msgspec.Struct, array_like=True):
    """What is new of one completion: none, one or several tokens, and perhaps its end.

    position: of the first token in the output, from 0; without tokens, of the next one. Whoever
        takes outcomes in sees by it what comes twice, or is missing.
    logprobs: of each token, if asked for.
    prompt_logprobs: parts, each (position in the prompt of the first entry, entries); the same may
        come twice.
    vector: of the prompt, raw, if that is what was asked for; it comes with the end.
    stop_reason: the stop string or stop token that ended it, ``timeout``, or for an error what went
        wrong.
    """

    index: int
    position: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    vector: Vector | None = None

    def add(self, later: "Outcome") -> None:
        """Take in the outcome that follows on this one."""
        assert self.finish_reason is None and later.position == self.position + len(self.tokens)
        self.tokens += later.tokens
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *later.logprobs]
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = [*(self.prompt_logprobs or ()), *later.prompt_logprobs]
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.vector = later.vector


@dataclass(slots=True)
class StepOutcomes:
    """What a step brought: as columns one token of each of ``sequences``, at ``positions`` of their
    outputs; and all that is more than that."""

    sequences: list[Sequence] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    others: list[tuple[Sequence, Outcome]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """All of it, by request."""
        for seq, position, token in zip(self.sequences, self.positions, self.tokens, strict=True):
            yield seq.request_id, Outcome(seq.index, position, [token])
        for seq, outcome in self.others:
            yield seq.request_id, outcome

    def __len__(self) -> int:
        return len(self.tokens) + len(self.others)

    def add(self, seq: Sequence, position: int, token: int) -> None:
        """A plain token."""
        self.sequences.append(seq)
        self.positions.append(position)
        self.tokens.append(token)


def end_of(seq: Sequence) -> Outcome:
    """That a sequence has ended, by no token of its own."""
    position = len(seq.tokens) - seq.prompt_len
    return Outcome(
        seq.index,
        position,
        [],
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
    )
