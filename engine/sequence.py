"""One completion being made: all the state that is needed to run it, or to run it elsewhere."""

import enum
from array import array

import numpy as np

from engine.blocks import ROOT, BlockHash, hash_block
from engine.continuation import Continuation, child_seed
from engine.extras import NONE, Extras
from engine.plan import Admit, Ints
from engine.sampling_params import SamplingParams


class State(enum.Enum):
    """Where the scheduler has a sequence."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a completion ended, as users are told."""

    STOP = "stop"  # a stop token or stop string, or the model's end token
    LENGTH = "length"  # max_tokens or the model's length
    ABORT = "abort"  # cancelled
    ERROR = "error"  # its logits were not finite, or the engine failed


class Sequence:
    """Tokens, position and blocks of one completion. The scheduler alone changes it.

    ``known`` counts the tokens whose values exist, here (``tokens``) or still on the workers
    (``pending``); ``computed`` counts those whose keys and values are in the cache once all
    plans so far have run. A step lets ``computed`` catch up with ``known``: there are no phases.
    """

    __slots__ = (
        "request", "request_id", "index", "tokens", "prompt_len", "max_total", "sampling", "seed",
        "stop_ids", "extras", "order", "runs_ahead", "state", "finish_reason", "stop_reason",
        "slot", "prefill_end", "computed", "pending", "untold", "blocks", "swapped", "published",
        "planned_in", "cached_tokens", "scheduled_time", "lost_tokens", "moved_tokens",
        "preempted_at", "deaths", "begun", "from_start", "live", "parked", "marks", "due",
        "trail", "_hashes",
    )  # fmt: skip

    def __init__(
        self,
        request: Continuation,
        index: int = 0,
        *,
        max_total: int,
        stop_ids: tuple[int, ...] = (),
        sampling: SamplingParams | None = None,
        extras: Extras = NONE,
        runs_ahead: bool = True,
        from_start: bool = False,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.index = index
        self.tokens = array("i", request.prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.tokens.extend(request.output(index))
        self.max_total = max_total  # most tokens of prompt and output
        self.sampling = sampling or request.sampling  # without what ``extras`` say
        self.seed = child_seed(request.seed, index)
        self.stop_ids = stop_ids
        self.extras = extras
        self.runs_ahead = runs_ahead  # whether it may be planned before its last result is there
        self.from_start = from_start  # whether none of it may come from the prefix cache
        self.order: float = 0.0  # the scheduler's queue key
        self.state = State.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.slot = -1
        self.prefill_end = 0  # tokens known when it was admitted: a row of those is a prefill
        self.computed = 0
        self.pending = 0
        self.untold = 0  # of its last tokens those that its workers did not sample
        self.blocks: list[int] = []  # device blocks, by index
        self.swapped: list[int] = []  # CPU blocks that stand in for them while swapped out
        self.published = 0  # leading blocks that were offered to the prefix cache
        self.live = self.parked = -1  # its state on the device, or while swapped out on the CPU
        self.marks: tuple[int, ...] = ()  # ends of blocks of its prompt whose states are to be kept
        self.due: BlockHash | None = None  # what its state is to be kept as
        self.trail: tuple[BlockHash, int] | None = None  # its last kept state, and where that is
        self.planned_in = -1  # the last step that has a row for it
        self.cached_tokens = 0  # prompt tokens found in the prefix cache at first admission
        self.scheduled_time: float | None = None  # of the first admission
        self.lost_tokens = 0  # computed tokens given up by the last recompute preemption
        self.moved_tokens = len(self.tokens) if request.moves else 0  # that were computed before
        self.preempted_at: tuple[float, ...] = ()  # moments of its preemptions
        self.deaths = request.deaths  # see ``Continuation``
        self.begun = False  # whether these workers have run it
        self._hashes: list[BlockHash] = []

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id}/{self.index}, {self.state.value}, prompt"
            f" {self.prompt_len}, known {self.known}, computed {self.computed})"
        )

    @property
    def known(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def output(self) -> "array[int]":
        return self.tokens[self.prompt_len :]

    @property
    def finished(self) -> bool:
        return self.state is State.FINISHED

    @property
    def pools(self) -> bool:
        """Whether it ends with its prompt, for which its slot gathers what swapping would lose."""
        return self.extras.pools

    def lose_workers(self) -> None:
        """The workers that ran it are gone: all it has are its tokens."""
        self.moved_tokens = max(self.computed, self.moved_tokens)
        self.deaths += self.begun
        self.begun = False
        self.slot = self.planned_in = -1
        self.computed = self.pending = self.published = 0
        self.blocks, self.swapped = [], []
        self.live = self.parked = -1
        self.due = None

    @property
    def wants_cache(self) -> bool:
        """Whether its prefix may come from the cache: prompt logprobs need every hidden state."""
        if self.from_start:
            return False
        return self.sampling.prompt_logprobs is None or len(self.tokens) > self.prompt_len

    def hashes(self, num_blocks: int, block_size: int) -> list[BlockHash]:
        """The chained hashes of at least its first ``num_blocks`` full blocks of known tokens."""
        hashes = self._hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else ROOT
            hashes.append(hash_block(parent, self.tokens[start : start + block_size]))
        return hashes

    def admit(self) -> Admit:
        return Admit(
            slot=self.slot,
            tokens=self.as_ints(),
            prompt_len=self.prompt_len,
            sampling=self.sampling,
            seed=self.seed,
            stop_ids=self.stop_ids,
            bad_words=self.request.bad_words,
            extras=self.extras,
            name=f"{self.request_id}/{self.index}",
        )

    def as_ints(self) -> Ints:
        return np.array(self.tokens, dtype=np.int32)
