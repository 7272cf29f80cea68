"""The scheduler: who runs how many tokens in the next step, and who is preempted for it.

``plan`` makes the next step, ``apply`` takes in what came of it. Plans may run ahead of results:
a plan needs no token value of the step before. Steps run in the order of their plans, so blocks
and slots that are freed while a step is in flight may be given away in the next plan at once.

In a pipeline the first stage cannot feed a token that the last one has not sampled yet. There the
running sequences are spread over several ``batches`` that are in flight at once and have none in
common; only the chunks of a prompt, whose tokens are all known, follow each other without waiting.
"""

import heapq
import itertools
import operator
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engine.blocks import blocks_for
from engine.config import SchedulerConfig
from engine.kv import KVBlocks, Prefix
from engine.outcome import Outcome, StepOutcomes, end_of
from engine.plan import Admit, StepPlan, StepResult, ints
from engine.pooling import Vector
from engine.preempt import Costs
from engine.sequence import FinishReason, Sequence, State
from engine.shares import FairShares
from engine.stats import MOST_PRIORITIES

AGEING_SECONDS = 30.0  # waiting this long counts as much as one step of priority
LEAST_CHUNK = 256  # tokens of prefill below which a pipeline gains nothing from smaller chunks
NOT_FINITE = (
    "the model's output was not finite, or bad_words left no token of allowed_token_ids to choose"
)
CHUNKS = 4  # of prefill for each stage of a pipeline, so that filling and draining it cost little


@dataclass
class SchedulerStats:
    """Counted since the start."""

    steps: int = 0
    planned_tokens: int = 0
    preemptions_swap: int = 0
    preemptions_recompute: int = 0
    recomputed_tokens: int = 0
    moved_tokens: int = 0  # computed again as an engine or its workers were lost, or left
    preempted: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and priority

    def preemption(self, kind: str, priority: int) -> None:
        """Count one, under at most ``MOST_PRIORITIES`` priorities: a client chooses them."""
        key = (kind, str(priority))
        if key not in self.preempted and len(self.preempted) >= 2 * MOST_PRIORITIES:
            key = (kind, "other")
        self.preempted[key] += 1


@dataclass(slots=True)
class _Draft:
    """A plan in the making, then in flight. Its rows are columns: see ``StepPlan``."""

    step: int
    budget: int  # tokens that may still be added
    tokens: int = 0
    prefill_tokens: int = 0
    sequences: list[Sequence] = field(default_factory=list)  # whose row it is
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    wants: list[bool] = field(default_factory=list)
    admits: list[Admit] = field(default_factory=list)
    told: list[tuple[int, int, int]] = field(default_factory=list)  # see ``StepPlan``
    begun: list[Sequence] = field(default_factory=list)  # those that these workers run first here
    promised: int = 0  # blocks that running prefills will still need
    victims: list[tuple[int, int, float, int, Sequence]] | None = None  # a heap, once it is needed
    preempted: bool = False


_order = operator.attrgetter("order")


class Scheduler:
    """One for each model replica. Sequences are added once and end in ``apply`` or ``finish``.

    ``batches`` is how many disjoint batches are in flight at once; with 1 a sequence that may run
    ahead of its results may have any number of steps in flight. A sequence that was running in
    ``alone_from`` failures in a row begins while no other of that kind does.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVBlocks,
        costs: Costs,
        batches: int = 1,
        alone_from: int = 2,
    ) -> None:
        self.config = config
        self.kv = kv
        self.costs = costs
        self.batches = batches
        self.stats = SchedulerStats()
        self.num_running = 0
        self._running: list[Sequence] = []  # in queue order; those that left go with the next plan
        self._waiting: list[tuple[float, int, Sequence]] = []  # a heap
        self.num_waiting = 0
        self.waiting_tokens = 0  # tokens that the waiting sequences have still to compute
        self._arrivals = itertools.count()
        self._shares = FairShares() if config.scheduling_policy == "fair" else None
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._released: list[int] = []  # slots; free at once, as a plan releases before it admits
        self._alone_from = alone_from
        self._in_flight: deque[_Draft] = deque()
        self._begun: list[Sequence] = []  # since the last ``take_begun``
        self._step = 0
        kv.promote = costs.promotion_pays(kv.block_size)

    # ---- the queue ----

    @property
    def has_work(self) -> bool:
        return bool(self.num_running or self.num_waiting or self._in_flight)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a slot, in queue order."""
        return [seq for seq in self._running if seq.state is State.RUNNING]

    def waiting(self) -> Iterable[Sequence]:
        """The sequences in the queue, in no order."""
        return (seq for _, _, seq in self._waiting if seq.state is State.WAITING)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence, in the place of its age."""
        arrival = time.monotonic() - seq.request.age
        if self.config.scheduling_policy == "priority":
            # Ageing as a constant: waiting longer and having arrived earlier are the same.
            seq.order = seq.request.priority + arrival / AGEING_SECONDS
        elif self._shares is not None:
            seq.order = self._shares.arrive(
                seq.request.client, seq.max_total, moved=seq.request.moves > 0
            )
        else:
            seq.order = arrival
        self._enqueue(seq)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence now, whatever its state; every block that it holds is freed."""
        if not seq.finished:
            self._finish(seq, reason)

    def take_begun(self) -> list[Sequence]:
        """The sequences that these workers run for the first time in the plans since the last
        call."""
        begun, self._begun = self._begun, []
        return begun

    def lose_workers(self) -> None:
        """New workers take the place of the ones that there were: whoever ran, or had blocks, is
        queued again in its old place, to be computed from its tokens."""
        for seq in [*self.running, *self.waiting()]:
            if seq.state is State.RUNNING:
                seq.lose_workers()
                self.num_running -= 1
                self._enqueue(seq)
            else:
                self._dequeue(seq)
                seq.lose_workers()
                self.num_waiting += 1
                self.waiting_tokens += seq.known
        self.kv.clear()
        self._running, self._released, self._begun = [], [], []
        self._free_slots = list(range(self.config.max_num_seqs - 1, -1, -1))
        self._in_flight.clear()

    def _enqueue(self, seq: Sequence) -> None:
        seq.state = State.WAITING
        heapq.heappush(self._waiting, (seq.order, next(self._arrivals), seq))
        self.num_waiting += 1
        self.waiting_tokens += seq.known - seq.computed

    def _dequeue(self, seq: Sequence) -> None:
        self.num_waiting -= 1
        self.waiting_tokens -= seq.known - seq.computed

    def _head(self) -> Sequence | None:
        while self._waiting and self._waiting[0][2].state is not State.WAITING:
            heapq.heappop(self._waiting)  # cancelled while it waited
        return self._waiting[0][2] if self._waiting else None

    # ---- planning ----

    def plan(self) -> StepPlan | None:
        """The next step; None if nothing can run before a result comes back."""
        self.kv.settle()
        draft = _Draft(self._step, self.config.max_num_batched_tokens)
        self._plan_running(draft)
        if not draft.preempted:
            self._plan_waiting(draft)
        if draft.admits:
            self._running.sort(key=_order)  # nearly sorted, which takes linear time
        if not draft.sequences:
            return None
        cells, copies = self.kv.drain()
        plan = StepPlan(
            step=draft.step,
            slots=ints(draft.slots),
            starts=ints(draft.starts),
            counts=ints(draft.counts),
            wants=ints(draft.wants),
            cells=cells,
            admits=tuple(draft.admits),
            release=ints(self._released),
            copies=copies,
            told=ints(draft.told),
            states=self.kv.drain_states(),
        )
        self._released = []
        self._begun += draft.begun
        self._in_flight.append(draft)
        self._step += 1
        self.stats.steps += 1
        self.stats.planned_tokens += draft.tokens
        return plan

    def _plan_running(self, draft: _Draft) -> None:
        decodes: list[Sequence] = []
        counts: list[int] = []  # of tokens that each of them has to compute
        prefills: list[Sequence] = []
        self._running = self.running
        for seq in self._running:
            if (computed := seq.computed) < seq.prefill_end:
                prefills.append(seq)
            elif computed < (known := seq.known) < seq.max_total and (
                seq.runs_ahead or not seq.pending
            ):  # else all of its tokens are planned, or it waits for one
                decodes.append(seq)
                counts.append(known - computed)
        decodes = self._batch(decodes)
        spare = draft.budget - len(decodes)  # each has one token at least
        for seq, count in zip(decodes, counts, strict=False):
            if count > 1:
                count = min(count, spare + 1)
                spare -= count - 1
            self._run(draft, seq, count)
        draft.victims = None
        if self.batches > 1 and self.config.enable_chunked_prefill:
            draft.budget = min(draft.budget, self._prefill_share(prefills))
        for seq in prefills:  # after the decodes: a long prompt never holds them up
            if draft.budget and seq.state is State.RUNNING:
                count = min(seq.prefill_end - seq.computed, draft.budget)
                self._run(draft, seq, self.kv.cut(seq, count))
        draft.promised = sum(
            blocks_for(seq.known, self.kv.block_size) - len(seq.blocks) for seq in prefills
        )

    def _batch(self, decodes: list[Sequence]) -> list[Sequence]:
        """The first of the sequences that can decode, as many as this plan takes: in a pipeline no
        more than an even share of all that decode, which leaves the next batch its own."""
        if self.batches == 1:
            return decodes
        decoding = sum(seq.computed >= seq.prefill_end for seq in self._running)
        return decodes[: -(-decoding // self.batches)]

    def _prefill_share(self, prefills: list[Sequence]) -> int:
        """Tokens of prefill for this plan of a pipeline, so that every stage has some to do."""
        tokens = sum(seq.known - seq.computed for seq in prefills)
        tokens += self.waiting_tokens + sum(draft.prefill_tokens for draft in self._in_flight)
        return max(LEAST_CHUNK, -(-tokens // (self.batches * CHUNKS)))

    def _run(self, draft: _Draft, seq: Sequence, count: int) -> None:
        """Add a row for a running sequence, preempting others, or itself, if blocks run out."""
        if seq.state is not State.RUNNING:  # preempted by one before it
            return
        end = seq.computed + count
        if end > len(seq.blocks) * self.kv.block_size:
            while not self.kv.grow(seq, end):
                victim = self._victim(draft, seq)
                self._preempt(draft, victim)
                if victim is seq:
                    return
        self._add_row(draft, seq, count)

    def _add_row(self, draft: _Draft, seq: Sequence, count: int) -> None:
        start = seq.computed
        seq.computed = end = start + count
        wants = end == seq.known and end < seq.max_total
        seq.planned_in = draft.step
        draft.sequences.append(seq)
        draft.slots.append(seq.slot)
        draft.starts.append(start)
        draft.counts.append(count)
        draft.wants.append(wants)
        draft.budget -= count
        draft.tokens += count
        if wants:
            seq.pending += 1
        if seq.untold:
            self._tell(draft, seq)
        if start < seq.prefill_end:
            draft.prefill_tokens += count
            self.kv.publish(seq)  # what this step writes, later rows of it may already share

    def _tell(self, draft: _Draft, seq: Sequence) -> None:
        first = len(seq.tokens) - seq.untold
        draft.told += [
            (seq.slot, position, token) for position, token in enumerate(seq.tokens[first:], first)
        ]
        seq.untold = 0

    def _plan_waiting(self, draft: _Draft) -> None:
        while draft.budget and self._free_slots:
            seq = self._head()
            if seq is None or seq.pending:  # its last tokens are still on the workers
                return
            if seq.deaths >= self._alone_from and self._unproven():
                return
            known = seq.known
            prefix = Prefix()
            if seq.swapped:
                start = seq.computed
                missing = self.kv.missing_to_swap_in(seq, known)
            else:
                prefix = self.kv.match(seq)
                if prefix.coming:
                    return
                start = len(prefix.blocks) * self.kv.block_size
                missing = self.kv.missing(seq, prefix, known)
            if not self.config.enable_chunked_prefill and known - start > draft.budget:
                return
            # What running prefills will need, and a block for every running sequence, stays
            # free, lest the next steps preempt again.
            if not self.kv.fits(missing + draft.promised + self.num_running):
                return
            self._admit(draft, seq, prefix)
            draft.promised += blocks_for(known, self.kv.block_size) - len(seq.blocks)

    def _admit(self, draft: _Draft, seq: Sequence, prefix: Prefix) -> None:
        heapq.heappop(self._waiting)
        self._dequeue(seq)
        seq.state = State.RUNNING
        seq.slot = self._free_slots.pop()
        if seq.swapped:
            self.kv.swap_in(seq)
        else:
            self.kv.claim(seq, prefix)
            if not seq.preempted_at:
                seq.cached_tokens = seq.computed
                seq.scheduled_time = time.monotonic()
            if self._shares is not None:
                self._shares.serve(seq.order)
            self.stats.recomputed_tokens += max(0, seq.lost_tokens - seq.computed)
            self.stats.moved_tokens += max(0, seq.moved_tokens - seq.computed)
            seq.lost_tokens = seq.moved_tokens = 0
        draft.admits.append(seq.admit())
        seq.untold = 0
        self.num_running += 1
        self._running.append(seq)
        seq.prefill_end = seq.known
        if not seq.begun:
            seq.begun = True
            draft.begun.append(seq)
        count = self.kv.cut(seq, min(seq.known - seq.computed, draft.budget))
        grown = self.kv.grow(seq, seq.computed + count)
        assert grown, "admission counted the blocks"
        self._add_row(draft, seq, count)

    def _unproven(self) -> bool:
        """Whether one runs already that may be what ends engines."""
        return any(
            seq.deaths >= self._alone_from and seq.state is State.RUNNING for seq in self._running
        )

    # ---- preemption ----

    def _victim(self, draft: _Draft, needy: Sequence) -> Sequence:
        """Who gives way to ``needy``: of those behind it that have no row in this plan, one of
        the lowest priority, and of these the one that loses the least work; else itself.

        Who has a row or gave way already, or is before the needy one, stays so while the plan
        goes on in queue order. So one heap serves for all victims among as many sequences.
        """
        if draft.victims is None:
            draft.victims = [
                (*self._loss(seq), -seq.order, number, seq)
                for number, seq in enumerate(self._running)
                if seq.state is State.RUNNING
                and seq.planned_in != draft.step
                and seq.order > needy.order
            ]
            heapq.heapify(draft.victims)
        while draft.victims:
            seq = heapq.heappop(draft.victims)[-1]
            if (
                seq.state is State.RUNNING
                and seq.planned_in != draft.step
                and seq.order > needy.order
            ):
                return seq
        return needy

    def _loss(self, seq: Sequence) -> tuple[int, int]:
        """The order in which sequences give way: (priority, tokens that nobody else keeps)."""
        lost = max(0, seq.computed - self.kv.num_shared(seq) * self.kv.block_size)
        return (-seq.request.priority if self.config.scheduling_policy == "priority" else 0), lost

    def _swap_pays(self, seq: Sequence) -> bool:
        """Whether to preempt ``seq`` by swapping, rather than recomputing."""
        mode = "recompute" if seq.pools else self.config.preemption_mode
        if mode == "auto":
            swap = self.costs.swap(*self.kv.swap_cost(seq))
            return swap < self.costs.recompute(seq.computed)
        return mode == "swap"

    def _preempt(self, draft: _Draft, seq: Sequence) -> None:
        """Take a running sequence's blocks and slot and queue it again, in its old place."""
        draft.preempted = True
        if self._swap_pays(seq) and self.kv.swap_out(seq):
            self.stats.preemptions_swap += 1
            self.stats.preemption("swap", seq.request.priority)
        else:
            self.kv.release(seq)
            seq.lost_tokens, seq.computed = seq.computed, 0
            self.stats.preemptions_recompute += 1
            self.stats.preemption("recompute", seq.request.priority)
        seq.preempted_at += (time.monotonic(),)
        self._leave(seq)
        self._enqueue(seq)

    def _leave(self, seq: Sequence) -> None:
        self.num_running -= 1
        self._released.append(seq.slot)
        self._free_slots.append(seq.slot)
        seq.slot = -1

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.state is State.RUNNING:
            self._leave(seq)
        else:
            self._dequeue(seq)
        if self._shares is not None:
            self._shares.give_back(seq.request.client, seq.max_total - len(seq.tokens))
        self.kv.release(seq)
        seq.state = State.FINISHED
        seq.finish_reason = reason

    # ---- results ----

    def apply(self, result: StepResult) -> StepOutcomes:
        """Take in a step's result; what it brought for the sequences that have not ended."""
        draft = self._in_flight.popleft()
        assert draft.step == result.step, f"step {result.step} came back for step {draft.step}"
        self._observe(draft, result)
        outcomes = StepOutcomes()
        prompts = dict(result.prompt_logprobs)  # by row
        any_failed = bool(result.failed.any())
        pairs = zip(result.rows.tolist(), result.tokens.tolist(), strict=True)
        for i, (number, token) in enumerate(pairs):
            seq = draft.sequences[number]
            if any_failed and result.failed[i]:
                self._fail(seq, outcomes)
            if seq.state is State.FINISHED:
                continue
            position = len(seq.tokens) - seq.prompt_len
            seq.pending -= 1
            seq.deaths = 0
            seq.tokens.append(token)
            if seq.state is State.RUNNING:
                self.kv.publish(seq)
            self._end_if_done(seq, token)
            forced = self._take_forced(seq, result.forced[i]) if i in result.forced else []
            logprobs, entries = result.logprobs.get(i), prompts.pop(number, None)
            plain = logprobs is None and entries is None and not forced
            if plain and seq.state is not State.FINISHED:
                outcomes.add(seq, position, token)
                continue
            outcome = Outcome(seq.index, position, [token, *forced])
            outcome.logprobs = None if logprobs is None else [logprobs]
            if entries is not None:
                outcome.prompt_logprobs = [(draft.starts[number] + 1, entries)]
            outcome.finish_reason, outcome.stop_reason = seq.finish_reason, seq.stop_reason
            outcomes.others.append((seq, outcome))
        for number, entries in prompts.items():
            seq = draft.sequences[number]
            if not seq.finished:
                outcome = Outcome(seq.index, len(seq.tokens) - seq.prompt_len, [])
                outcome.prompt_logprobs = [(draft.starts[number] + 1, entries)]
                outcomes.others.append((seq, outcome))
        for number, vector in result.vectors.items():
            self._take_vector(draft.sequences[number], vector, outcomes)
        return outcomes

    def _take_vector(self, seq: Sequence, vector: Vector, outcomes: StepOutcomes) -> None:
        """The end of a sequence that pools."""
        if seq.finished:
            return
        if not np.isfinite(vector).all():
            self._fail(seq, outcomes)
            return
        self._finish(seq, FinishReason.STOP)
        outcome = end_of(seq)
        outcome.vector = vector
        outcomes.others.append((seq, outcome))

    def _fail(self, seq: Sequence, outcomes: StepOutcomes) -> None:
        """Logits of the sequence were not finite."""
        self.kv.withdraw(seq)  # it was published when it was planned
        if not seq.finished:
            seq.stop_reason = NOT_FINITE
            self._finish(seq, FinishReason.ERROR)
            outcomes.others.append((seq, end_of(seq)))

    def _take_forced(self, seq: Sequence, forced: list[int]) -> list[int]:
        """Append what the token that was sampled forces, as far as there is room: those."""
        forced = forced[: seq.max_total - len(seq.tokens)]
        if seq.finished or not forced:
            return []
        seq.tokens.extend(forced)
        seq.untold = len(forced)
        if seq.state is State.WAITING:
            self.waiting_tokens += len(forced)
        self._end_if_done(seq, forced[-1])
        return forced

    def _end_if_done(self, seq: Sequence, token: int) -> None:
        if token in seq.stop_ids:
            # The model's own end is no reason to name.
            if token in (seq.sampling.stop_token_ids or ()):
                seq.stop_reason = token
            self._finish(seq, FinishReason.STOP)
        elif len(seq.tokens) >= seq.max_total:
            self._finish(seq, FinishReason.LENGTH)

    def _observe(self, draft: _Draft, result: StepResult) -> None:
        """Keep the costs current: by steps that are nearly all prefill, and by copies."""
        if draft.tokens >= 64 and draft.tokens > 8 * len(draft.sequences):
            self.costs.observe_prefill(draft.tokens, result.seconds)
        self.costs.observe_copies(result.copied)
        self.kv.promote = self.costs.promotion_pays(self.kv.block_size)
