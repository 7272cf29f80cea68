"""A model-free executor: its KV cells remember what was written, its tokens depend on all of it.

Each token's cell holds a hash of the whole prefix up to it, written through the block table. A
row first reads every block of its table and compares it with what its own tokens say must be
there, so a wrong or stale block, a missed copy or a wrong order of effects fails at once; and the
token that it samples is a function of that prefix, so the output can be foretold.
"""

from dataclasses import dataclass, field

import numpy as np

from engine.executor import Capacity, ModelFacts
from engine.plan import StepPlan, StepResult, ints
from engine.preempt import MeasuredCosts

VOCAB = 50_000
_MIX = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def extend(chain: int, token: int) -> int:
    """The prefix hash after one more token."""
    z = ((chain ^ (token + 1)) * _MIX) & _MASK
    return z ^ (z >> 29)


def next_token(chain: int, seed: int) -> int:
    """The token that the simulated model samples after a prefix."""
    return ((chain ^ (seed * _MIX & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK) >> 33 % VOCAB


def foretell(prompt: list[int], seed: int, num: int) -> list[int]:
    """The first ``num`` tokens that follow ``prompt``."""
    chain = 0
    for token in prompt:
        chain = extend(chain, token)
    out = []
    for _ in range(num):
        token = next_token(chain, seed) % VOCAB
        out.append(token)
        chain = extend(chain, token)
    return out


@dataclass
class _Slot:
    tokens: list[int]
    seed: int
    chains: list[int] = field(default_factory=list)  # expected, by position


@dataclass
class _Done:
    value: StepResult
    sampled: list[tuple[_Slot, int]]  # tokens that the first stage learns with the result

    def result(self) -> StepResult:
        for slot, token in self.sampled:
            slot.tokens.append(token)
        return self.value


class SimulatedExecutor:
    """Runs plans without a model. ``device`` [device blocks, block size] are prefix hashes.

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
    ) -> None:
        self.pipelined = pipelined
        self.costs = costs or MeasuredCosts(1e-5, 1e-5, 1e-4)
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.device = np.zeros((num_device_blocks, block_size), np.uint64)
        self.cpu = np.zeros((num_cpu_blocks, block_size), np.uint64)
        self.tables = np.full((num_slots, -(-max_model_len // block_size)), -1, np.int32)
        self.slots: dict[int, _Slot] = {}
        self.steps = 0

    def load(self) -> ModelFacts:
        return ModelFacts("Simulated", VOCAB, self.max_model_len, 0, 0, 0.0, "none", "none")

    def reserve(self) -> Capacity:
        return Capacity(
            len(self.device), len(self.cpu), self.block_size, 1, "Simulated", self.costs
        )

    def run(self, plan: StepPlan) -> _Done:
        assert plan.step == self.steps, "plans come in order"
        self.steps += 1
        for slot in plan.release.tolist():
            del self.slots[slot]
            self.tables[slot] = -1
        for admit in plan.admits:
            assert admit.slot not in self.slots, "the slot is taken"
            self.slots[admit.slot] = _Slot(admit.tokens.tolist(), admit.seed)
        for slot, index, block in plan.cells.tolist():
            assert slot in self.slots
            self.tables[slot, index] = block
        self._copy(plan)
        tokens = [self._row(plan, i) for i in range(len(plan.slots))]
        wanted = ints([t for t, w in zip(tokens, plan.wants, strict=True) if w])
        slots = [self.slots[slot] for slot in plan.slots[plan.wants == 1].tolist()]
        sampled = list(zip(slots, wanted.tolist(), strict=True))
        if not self.pipelined:
            for slot, token in sampled:
                slot.tokens.append(token)
            sampled = []
        return _Done(
            StepResult(
                step=plan.step,
                slots=plan.slots[plan.wants == 1],
                tokens=wanted,
                failed=np.zeros(len(wanted), np.bool_),
                logprobs={},
                prompt_logprobs={},
                seconds=1e-3,
            ),
            sampled,
        )

    def check(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def _copy(self, plan: StepPlan) -> None:
        out, in_ = plan.copies.out, plan.copies.in_
        for pairs in (out, in_):  # as copies that run side by side need
            assert len(set(pairs[:, 1].tolist())) == len(pairs), "two copies to one block"
        self.cpu[out[:, 1]] = self.device[out[:, 0]]
        self.device[in_[:, 1]] = self.cpu[in_[:, 0]]

    def _row(self, plan: StepPlan, i: int) -> int:
        slot, start, count = int(plan.slots[i]), int(plan.starts[i]), int(plan.counts[i])
        state, size = self.slots[slot], self.block_size
        assert start + count <= len(state.tokens), "a row feeds a token that nobody knows"
        table = self.tables[slot]
        for position in range(len(state.chains), start + count):
            before = state.chains[-1] if state.chains else 0
            state.chains.append(extend(before, state.tokens[position]))
        used = table[: -(-(start + count) // size)]
        assert (used >= 0).all(), "a block is missing"
        assert len(set(used.tolist())) == len(used), "a block stands twice in a table"
        if start:
            held = self.device[used].reshape(-1)[:start]
            expected = np.array(state.chains[:start], np.uint64)
            assert (held == expected).all(), f"slot {slot}: a wrong or stale block"
        for position in range(start, start + count):
            self.device[table[position // size], position % size] = state.chains[position]
        if plan.wants[i]:
            assert start + count == len(state.tokens)
            return next_token(state.chains[-1], state.seed) % VOCAB
        return -1
