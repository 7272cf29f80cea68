"""The waist: one ``StepPlan`` goes down to the workers, one ``StepResult`` comes back.

A worker knows *slots*, not requests: a slot is a row of its device tables (tokens, block table,
sampling parameters). A plan carries only what changed. Both values are frozen and complete.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.extras import NONE, Extras
from engine.sampling_params import SamplingParams

Ints = NDArray[np.int32]


def ints(values: object = ()) -> Ints:
    """``values`` as an int32 array."""
    return np.asarray(values, dtype=np.int32)


def pairs(values: object = ()) -> Ints:
    """``values`` as an int32 array of shape [n, 2]."""
    return np.asarray(values, dtype=np.int32).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class Admit:
    """A slot is taken. New, resumed and failed-over requests are all this one record.

    ``tokens`` are all tokens known so far (prompt, then output); the first ``prompt_len`` of
    them are the prompt (penalties and ``min_tokens`` tell them apart).
    ``stop_ids`` are the token ids that end the request: they are masked until ``min_tokens``.
    ``bad_words`` are the token id sequences that must never be completed.
    ``extras`` are what else acts on the slot; the scheduler does not look at them.
    ``name`` says whose it is (the request's id, the completion's index): for logs, not workers.
    """

    slot: int
    tokens: Ints
    prompt_len: int
    sampling: SamplingParams
    seed: int
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    extras: Extras = NONE
    name: str = ""


@dataclass(frozen=True, slots=True)
class Copies:
    """Block copies, done before the step computes: [n, 2] arrays of (source, destination)."""

    out: Ints = field(default_factory=pairs)  # device block to CPU block
    in_: Ints = field(default_factory=pairs)  # CPU block to device block

    def __bool__(self) -> bool:
        return bool(len(self.out) or len(self.in_))


@dataclass(frozen=True, slots=True)
class StateMoves:
    """What becomes of the states of layers that keep one of each sequence.

    Order of effects: ``copies`` between the tiers, then ``forks`` within the device, all of which
    read before any writes; a source of -1 is the state before the first token.
    """

    cells: Ints = field(default_factory=pairs)  # [n, 2]: slot, the state of its rows from now on
    copies: Copies = field(default_factory=Copies)
    forks: Ints = field(default_factory=pairs)  # [n, 2]: source, target


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the workers do in one step.

    Order of effects: ``release``, ``admits``, ``told``, ``cells``, ``copies``, ``states``, then the
    rows compute.
    Row i feeds tokens ``starts[i] : starts[i] + counts[i]`` of slot ``slots[i]``; where
    ``wants[i]`` is 1 the worker samples the token at position ``starts[i] + counts[i]`` and
    keeps it in its token table, so that a later plan may feed it without knowing its value.
    """

    step: int
    slots: Ints  # [rows]
    starts: Ints  # [rows]
    counts: Ints  # [rows]
    wants: Ints  # [rows], 0 or 1
    cells: Ints  # [n, 3]: slot, index in its block table, block
    admits: tuple[Admit, ...] = ()
    release: Ints = field(default_factory=ints)  # slots
    copies: Copies = field(default_factory=Copies)
    told: Ints = field(default_factory=ints)  # [n, 3]: slot, position, token that none sampled
    states: StateMoves | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token's first, then the top ones'.

    ``ids``, ``logprobs`` and ``ranks`` are [k] arrays; ranks count from 1.
    """

    ids: Ints
    logprobs: NDArray[np.float32]
    ranks: Ints


@dataclass(frozen=True, slots=True)
class CopyTimes:
    """What copies between the tiers were seen to take: blocks and seconds, each way."""

    blocks_out: int = 0
    seconds_out: float = 0.0
    blocks_in: int = 0
    seconds_in: float = 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan: tokens in row order. A row may yield none, one or several.

    ``forced`` are tokens that can only follow the one that was sampled, so that nobody has to
    sample them; the workers know them once a plan has ``told`` them.
    ``seconds`` is what one rank computed for, without copies. ``copied`` are the copies that
    ended since the result before, of this step or an earlier one. ``vectors`` are those of
    prompts that are pooled, of which the row had the last token.
    """

    step: int
    rows: Ints  # [n]: which row of the plan each token is of
    tokens: Ints  # [n]
    failed: NDArray[np.bool_]  # [n]: the logits were not finite; the token means nothing
    logprobs: dict[int, TokenLogprobs]  # by index into ``tokens``, where asked for
    prompt_logprobs: dict[int, list[TokenLogprobs]]  # by row: of positions start + 1, ...
    seconds: float
    copied: CopyTimes = CopyTimes()
    vectors: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # by row
    forced: dict[int, list[int]] = field(default_factory=dict)  # by index into ``tokens``
