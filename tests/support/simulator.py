"""A model-free executor: its KV cells remember what was written, its tokens depend on all of it.

Each token's cell holds a hash of the whole prefix up to it, written through the block table. A
row reads every block of its table and compares it with what its own tokens say must be there, so
a wrong or stale block, a missed copy or a wrong order of effects fails at once; and the token
that it samples is a function of that prefix, so the output can be foretold. Rows are handled all
at once, in numpy: a hundred thousand requests take minutes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.executor import Capacity, ModelFacts
from engine.plan import Copies, CopyTimes, Ints, StateMoves, StepPlan, StepResult, ints
from engine.pooling import Pooling
from engine.preempt import MeasuredCosts

VOCAB = 50_000
_MIX = 0x9E3779B97F4A7C15
_PICK = 0xBF58476D1CE4E5B9
_MASK = 2**64 - 1

Words = NDArray[np.uint64]


def extend(chain: int, token: int) -> int:
    """The prefix hash after one more token."""
    z = ((chain ^ (token + 1)) * _MIX) & _MASK
    return z ^ (z >> 29)


def next_token(chain: int, seed: int) -> int:
    """The token that the simulated model samples after a prefix."""
    return (((chain ^ (seed * _MIX & _MASK)) * _PICK & _MASK) >> 33) % VOCAB


def foretell(prompt: list[int], seed: int, num: int) -> list[int]:
    """The first ``num`` tokens that follow ``prompt``."""
    chain = 0
    for token in prompt:
        chain = extend(chain, token)
    out = []
    for _ in range(num):
        token = next_token(chain, seed)
        out.append(token)
        chain = extend(chain, token)
    return out


def foretell_vector(prompt: list[int]) -> list[float]:
    """What ``prompt`` is pooled to."""
    chain = 0
    for token in prompt:
        chain = extend(chain, token)
    return [float(chain >> 40), float(len(prompt))]


@dataclass
class _Done:
    executor: "SimulatedExecutor"
    value: StepResult
    late: tuple[Ints, Ints, Ints] | None  # admissions, slots and tokens that are fed from now on

    def result(self) -> StepResult:
        if self.late is not None:
            admissions, slots, tokens = self.late
            same = self.executor.admissions[slots] == admissions  # else the slot has another's
            self.executor.learn(slots[same], tokens[same])
        return self.value


class SimulatedExecutor:
    """Runs plans without a model. ``device`` [device blocks, block size] are prefix hashes; so are
    ``states``, each of all tokens that a sequence has fed.

    Where it is ``pipelined`` a sampled token can be fed only after the result was taken, as by
    the first stage of a pipeline; else at once.
    """

    def __init__(
        self,
        num_device_blocks: int,
        num_cpu_blocks: int,
        block_size: int,
        num_slots: int,
        max_model_len: int,
        costs: MeasuredCosts | None = None,
        pipelined: bool = False,
        steps_ahead: int = 0,
        most_forced: int = 0,
        num_states: int = 0,
        num_cpu_states: int = 0,
    ) -> None:
        self.pipelined = pipelined
        self.steps_ahead = steps_ahead
        self.most_forced = most_forced
        self.costs = costs or MeasuredCosts(1e-5, 1e-5, 1e-4)
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.spoil = False  # whether what rows write now is not finite
        self.steps = 0
        self._sizes = num_device_blocks, num_cpu_blocks, num_slots
        self._num_states = num_states, num_cpu_states
        self._forget()

    def _forget(self) -> None:
        """As a worker that has just started."""
        num_device_blocks, num_cpu_blocks, num_slots = self._sizes
        block_size, max_model_len = self.block_size, self.max_model_len
        self.device = np.zeros((num_device_blocks, block_size), np.uint64)
        self.cpu = np.zeros((num_cpu_blocks, block_size), np.uint64)
        self.tables = np.full((num_slots, -(-max_model_len // block_size)), -1, np.int32)
        self.chains = np.zeros((num_slots, max_model_len + 1), np.uint64)  # expected, by position
        self.known = np.zeros(num_slots, np.int32)  # tokens that may be fed; 0 is a free slot
        self.seeds = np.zeros(num_slots, np.uint64)
        self.admissions = np.zeros(num_slots, np.int32)  # of each slot so far
        self.grammars = np.zeros(num_slots, np.bool_)  # whether the slot's sequence has one
        self.spoilt = np.zeros((num_device_blocks, block_size), np.bool_)  # cells that are not
        self.spoilt_cpu = np.zeros((num_cpu_blocks, block_size), np.bool_)
        self.states, self.cpu_states = (np.zeros(n, np.uint64) for n in self._num_states)
        self.spoilt_states, self.spoilt_cpu_states = (
            np.zeros(n, np.bool_) for n in self._num_states
        )
        self.state_of = np.full(num_slots, -1, np.int32)
        self.pooled: dict[int, tuple[int, int]] = {}  # slot: prompt's tokens, those that were fed

    def load(self) -> ModelFacts:
        return ModelFacts(
            "Simulated", VOCAB, self.max_model_len, 0, 0, 0.0, "none", "none",
            pooling=Pooling("mean"), vector_size=2,
        )  # fmt: skip

    def reserve(self) -> Capacity:
        num_states, num_cpu_states = self._num_states
        return Capacity(
            len(self.device), len(self.cpu), self.block_size, 1, "Simulated", self.costs,
            num_states=num_states, num_cpu_states=num_cpu_states, state_bytes=3,
        )  # fmt: skip

    def run(self, plan: StepPlan) -> _Done:
        assert plan.step == self.steps, "plans come in order"
        self.steps += 1
        assert self.known[plan.release].all(), "a slot is released that nobody has"
        self.known[plan.release] = 0
        self.admissions[plan.release] += 1
        self.tables[plan.release] = self.state_of[plan.release] = -1
        for slot in plan.release.tolist():
            self.pooled.pop(slot, None)
        for admit in plan.admits:
            self._admit(admit.slot, admit.tokens.tolist(), admit.seed)
            if admit.extras.pools:
                self.pooled[admit.slot] = admit.prompt_len, 0
            self.grammars[admit.slot] = admit.extras.grammar is not None
        for told in plan.told:
            assert told[1] == self.known[told[0]], "a token is told too soon, or twice"
            self.learn(told[:1], told[2:])
        slots, index, block = plan.cells.T
        assert self.known[slots].all(), "a cell for a slot that nobody has"
        self.tables[slots, index] = block
        self._copy(plan.copies, (self.device, self.cpu), (self.spoilt, self.spoilt_cpu))
        if plan.states is not None:
            self._move_states(plan.states)
        tokens, spoilt = self._rows(plan)
        failed, vectors = spoilt[plan.wants == 1], self._pool(plan, spoilt)
        rows = ints(np.flatnonzero(plan.wants))
        slots, late = plan.slots[rows], None
        forced = self._forced(slots, tokens, failed)
        if self.pipelined:
            late = self.admissions[slots].copy(), slots, tokens
        else:
            self.learn(slots, tokens)
        copied = CopyTimes(len(plan.copies.out), 1e-5, len(plan.copies.in_), 1e-5)
        result = StepResult(
            plan.step, rows, tokens, failed, {}, {}, 1e-3, copied, vectors=vectors, forced=forced
        )
        return _Done(self, result, late)

    def restart(self) -> None:
        self._forget()

    def check(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def learn(self, slots: Ints, tokens: Ints) -> None:
        """The last sampled tokens of some slots, which may be fed now."""
        at = self.known[slots]
        before = self.chains[slots, at - 1]
        z = (before ^ (tokens.astype(np.uint64) + np.uint64(1))) * np.uint64(_MIX)
        self.chains[slots, at] = z ^ (z >> np.uint64(29))
        self.known[slots] = at + 1

    def _forced(self, slots: Ints, tokens: Ints, failed: NDArray[np.bool_]) -> dict[int, list[int]]:
        """Of sequences with a grammar some tokens are forced: those that would be sampled."""
        found: dict[int, list[int]] = {}
        if not self.most_forced:
            return found
        for i in np.flatnonzero(self.grammars[slots] & ~failed):
            chain, token = int(self.chains[slots[i], self.known[slots[i]] - 1]), int(tokens[i])
            seed = int(self.seeds[slots[i]])
            forced = found[int(i)] = list[int]()
            while len(forced) < self.most_forced and (token * _PICK >> 7) % 4:
                chain = extend(chain, token)
                token = (((chain ^ seed) * _PICK & _MASK) >> 33) % VOCAB
                forced.append(token)
        return found

    def _admit(self, slot: int, tokens: list[int], seed: int) -> None:
        assert self.known[slot] == 0, "the slot is taken"
        chain, chains = 0, []
        for token in tokens:
            chain = extend(chain, token)
            chains.append(chain)
        self.chains[slot, : len(chains)] = chains
        self.known[slot] = len(chains)
        self.seeds[slot] = seed * _MIX & _MASK
        self.admissions[slot] += 1

    def _copy(self, copies: Copies, *tiers: tuple[NDArray[Any], NDArray[Any]]) -> None:
        for pairs in (copies.out, copies.in_):  # as copies that run side by side need
            assert len(np.unique(pairs[:, 1])) == len(pairs), "two copies to one unit"
        for device, cpu in tiers:
            cpu[copies.out[:, 1]] = device[copies.out[:, 0]]
            device[copies.in_[:, 1]] = cpu[copies.in_[:, 0]]

    def _move_states(self, moves: StateMoves) -> None:
        slots, states = moves.cells.T
        assert self.known[slots].all(), "a state for a slot that nobody has"
        self.state_of[slots] = states
        spoilt = self.spoilt_states, self.spoilt_cpu_states
        self._copy(moves.copies, (self.states, self.cpu_states), spoilt)
        sources, targets = moves.forks.T
        assert len(np.unique(targets)) == len(targets), "two forks to one state"
        self.states[targets] = np.where(sources < 0, 0, self.states[sources])
        self.spoilt_states[targets] = (sources >= 0) & self.spoilt_states[sources]

    def _feed_states(self, plan: StepPlan) -> NDArray[np.bool_]:
        """Check and advance the rows' states; which of them are not finite."""
        slots, starts = plan.slots, plan.starts
        states = self.state_of[slots]
        assert (states >= 0).all() and len(np.unique(states)) == len(states), "a state is shared"
        before = np.where(starts > 0, self.chains[slots, starts - 1], 0)
        assert (self.states[states] == before).all(), "a wrong or stale state"
        self.states[states] = self.chains[slots, starts + plan.counts - 1]
        self.spoilt_states[states] |= self.spoil
        return self.spoilt_states[states]

    def _rows(self, plan: StepPlan) -> tuple[Ints, NDArray[np.bool_]]:
        """Write and check every row; the tokens that were wanted, and which of all rows read a cell
        that is not finite, so that what comes of them means nothing."""
        slots, starts, counts, size = plan.slots, plan.starts, plan.counts, self.block_size
        contexts = starts + counts
        assert len(np.unique(slots)) == len(slots), "a slot has two rows"
        assert (contexts <= self.known[slots]).all(), "a row feeds a token that nobody knows"
        row = np.repeat(np.arange(len(slots)), counts)
        ends = np.cumsum(counts)
        positions = np.arange(ends[-1]) - (ends - contexts)[row]
        blocks = self.tables[slots[row], positions // size]
        assert (blocks >= 0).all(), "a block is missing"
        self.device[blocks, positions % size] = self.chains[slots[row], positions]
        used = -(-int(contexts.max()) // size)
        tables = self.tables[slots, :used]
        context = np.arange(used * size) < contexts[:, None]
        self.spoilt[blocks, positions % size] = self.spoil
        spoilt = (self.spoilt[tables].reshape(len(slots), -1) & context).any(1)
        if len(self.states):
            spoilt = spoilt | self._feed_states(plan)
            self.spoilt_states[self.state_of[slots]] |= spoilt
        self.spoilt[blocks, positions % size] |= spoilt[row]
        held = self.device[tables].reshape(len(slots), -1)
        expected = self.chains[slots, : held.shape[1]]
        held = held[:, : expected.shape[1]]
        wrong = (held != expected) & context[:, : expected.shape[1]]
        if wrong.any():
            bad = int(np.flatnonzero(wrong.any(1))[0])
            raise AssertionError(f"slot {slots[bad]}: a wrong or stale block")
        wants = plan.wants == 1
        assert (contexts[wants] == self.known[slots[wants]]).all()
        last = self.chains[slots[wants], contexts[wants] - 1] ^ self.seeds[slots[wants]]
        picked = ((last * np.uint64(_PICK)) >> np.uint64(33)) % np.uint64(VOCAB)
        return ints(picked), spoilt

    def _pool(self, plan: StepPlan, spoilt: NDArray[np.bool_]) -> dict[int, NDArray[np.float32]]:
        """By row: the vectors of the prompts that end, all of whose tokens were fed in one stay."""
        vectors: dict[int, NDArray[np.float32]] = {}
        for row, slot in enumerate(plan.slots.tolist()):
            if slot not in self.pooled:
                continue
            length, fed = self.pooled[slot]
            fed += int(plan.counts[row])
            self.pooled[slot] = length, fed
            if int(plan.starts[row] + plan.counts[row]) == length:
                chain = int(self.chains[slot, length - 1])
                value = np.nan if spoilt[row] else float(chain >> 40)
                vectors[row] = np.array([value, fed], np.float32)
        return vectors
