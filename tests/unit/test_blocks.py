"""Block bookkeeping against plain models, under any sequence of operations.

The second machine drives ``KVBlocks`` as a scheduler does, carries its plans out on a simulated
memory, and looks whether every block that a sequence or the prefix cache names holds what it
should.
"""

import random
from array import array
from collections import Counter, deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.blocks import ROOT, BlockPool, blocks_for, hash_block
from engine.continuation import begin
from engine.kv import KVBlocks
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.states import States
from tests.support.simulator import extend

COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck))

SEEDS = st.integers(0, 2**32)  # of the choices that one step makes
STEMS = [[i % 3 for i in range(8)], [i // 3 % 3 for i in range(12)], [2] * 20]


class PoolMachine(RuleBasedStateMachine):
    """``BlockPool`` against a list of holders, a list of free blocks in order, and a dict."""

    @initialize(size=st.integers(1, 6))
    def start(self, size):
        self.pool = BlockPool(size)
        self.holders = [0] * size
        self.free = list(range(size))  # the next to be taken first
        self.cached = {}  # hash to block

    def cached_as(self, block):
        return next((h for h, b in self.cached.items() if b == block), None)

    @precondition(lambda self: self.free)
    @rule()
    def take(self):
        block, evicted = self.pool.take()
        assert block == self.free.pop(0)
        assert evicted == self.cached_as(block)
        self.cached.pop(evicted, None)
        self.holders[block] = 1

    @rule(data=st.data())
    def share(self, data):
        blocks = [b for b in range(len(self.holders)) if self.holders[b] or self.cached_as(b)]
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            self.pool.share(block)
            self.holders[block] += 1
            if block in self.free:
                self.free.remove(block)

    @rule(data=st.data())
    def release(self, data):
        held = [b for b, count in enumerate(self.holders) if count]
        if held:
            block = data.draw(st.sampled_from(held))
            self.pool.release(block)
            self.holders[block] -= 1
            if not self.holders[block]:
                at = len(self.free) if self.cached_as(block) else 0
                self.free.insert(at, block)

    @rule(data=st.data(), number=st.integers(0, 4))
    def publish(self, data, number):
        block_hash = hash_block(ROOT, array("i", [number]))
        blocks = [b for b, count in enumerate(self.holders) if count and not self.cached_as(b)]
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            assert self.pool.publish(block, block_hash) == (block_hash not in self.cached)
            self.cached.setdefault(block_hash, block)

    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.integers(0, len(self.holders) - 1))
        assert self.pool.forget(block) == self.cached_as(block)
        self.cached.pop(self.cached_as(block), None)

    @rule()
    def forget_all(self):
        self.pool.forget_all()
        self.cached.clear()

    @rule(data=st.data())
    def release_too_often(self, data):
        if self.free:
            with pytest.raises(AssertionError, match="released more often than it was taken"):
                self.pool.release(data.draw(st.sampled_from(self.free)))

    @invariant()
    def agrees(self):
        pool, blocks = self.pool, range(len(self.holders))
        pool.check()
        assert [pool.references(b) for b in blocks] == self.holders
        assert [pool.is_free(b) for b in blocks] == [b in self.free for b in blocks]
        assert (pool.num_free, pool.num_held) == (len(self.free), len(blocks) - len(self.free))
        assert {h: pool.find(h) for h in self.cached} == self.cached
        assert [pool.hash_of(b) for b in blocks] == [self.cached_as(b) for b in blocks]

    def teardown(self):
        for block, count in enumerate(getattr(self, "holders", [])):
            for _ in range(count):
                self.pool.release(block)
            assert self.pool.references(block) == 0 and self.pool.is_free(block)


class KVMachine(RuleBasedStateMachine):
    """``KVBlocks`` with sequences that run, wait, are preempted, come back and end at any moment.

    A cell of the simulated memory holds a hash of the whole prefix up to its token. Each plan is
    carried out there: copies out, copies in, then the rows in order. As in the scheduler,
    sequences end between plans, nobody is preempted after somebody was admitted, and results come
    later than the plans that follow them. In some runs a sequence has a state beside its blocks,
    which is a hash of all tokens that it was fed.
    """

    done: Counter[str] = Counter()  # what all of its runs did

    @initialize(
        num_device=st.integers(3, 10),
        num_cpu=st.sampled_from([3, 6, 20, 0]),
        block_size=st.integers(1, 3),
        caching=st.sampled_from([True, True, True, False]),
        num_states=st.sampled_from([0, 2, 3, 4, 6]),
        num_cpu_states=st.sampled_from([0, 1, 4, 8]),
        interval=st.sampled_from([None, 1, 2]),
    )
    def start(self, num_device, num_cpu, block_size, caching, num_states, num_cpu_states, interval):
        states = None
        if num_states:
            interval = interval and interval * block_size
            states = States(num_states, num_cpu_states, block_size, 1, interval)
        self.kv = KVBlocks(num_device, num_cpu, block_size, caching, states)
        self.states, self.cpu_states = [0] * num_states, [0] * num_cpu_states
        self.state_of = {}  # slot to the state that the plans named
        self.size = block_size
        self.device = [[0] * block_size for _ in range(num_device)]
        self.cpu = [[0] * block_size for _ in range(num_cpu)]
        self.tables = {}  # slot to the blocks that the cells named
        self.waiting, self.running, self.all = [], [], []
        self.written = {}  # sequence to all tokens that the workers know
        self.rows = []  # of the plan in the making: sequence, slot, start, count, wants
        self.results = deque()  # sampled, not yet known to the sequence
        self.slots = 0

    # ---- what happens to a scheduler: each time a plan follows ----

    @rule(seed=SEEDS)
    def arrive(self, seed):
        draw = random.Random(seed)
        for _ in range(draw.randint(1, 4)):
            most = len(self.device) * self.size
            stem = draw.choice(STEMS)[: draw.randint(0, 20)]
            tokens = stem + [draw.randrange(3) for _ in range(draw.randint(1, 3))]
            if len(tokens) < most and len(self.all) < 10:
                asked = 0 if draw.random() < 0.1 else None  # then nothing comes from the cache
                sampling = SamplingParams(prompt_logprobs=asked)
                seq = Sequence(begin(str(len(self.written)), tokens, sampling), max_total=most)
                self.written[seq] = list(tokens)
                self.waiting.append(seq)
                self.all.append(seq)
        self.plan(draw)

    @rule(seed=SEEDS)
    def results_come(self, seed):
        draw = random.Random(seed)
        for _ in range(draw.randint(0, len(self.results))):
            seq, token = self.results.popleft()
            if seq in self.all:
                seq.pending -= 1
                seq.tokens.append(token)
                if seq in self.running:
                    self.kv.publish(seq)
        self.plan(draw)

    @precondition(lambda self: self.all)
    @rule(seed=SEEDS)
    def end(self, seed):
        """An abort, a stop string or a last token: at any time between two plans."""
        draw = random.Random(seed)
        self.finish(draw.choice(self.all))
        self.plan(draw)

    @rule(seed=SEEDS)
    def costs_change(self, seed):
        draw = random.Random(seed)
        self.kv.promote = draw.random() < 0.9
        if draw.random() < 0.05:
            for pool in self.pools():
                pool.forget_all()
        self.plan(draw)

    # ---- what a scheduler does ----

    def pools(self):
        states = self.kv.states
        return [self.kv.device, self.kv.cpu] + (
            [states.tiers.device, states.tiers.cpu] if states else []
        )

    def plan(self, draw):
        self.kv.settle()
        for seq in list(self.running):
            if seq.known >= seq.max_total or draw.random() < 0.1:
                self.finish(seq)
        for seq in draw.sample(self.running, len(self.running)):
            if seq in self.running and draw.random() < 0.9:
                self.run(draw, seq)
        preempted = False
        while draw.random() < 0.25 and self.idle():
            self.preempt(draw, draw.choice(self.idle()))
            preempted = True
        for seq in draw.sample(self.waiting, len(self.waiting)):
            ready = not seq.pending and seq.computed < seq.known
            if ready and not preempted and draw.random() < 0.8:
                self.admit(draw, seq)
        if self.rows:  # else what was noted stays for the next plan
            self.carry_out(draw)

    def idle(self):
        """Running sequences without a row yet."""
        busy = [row[0] for row in self.rows]
        return [seq for seq in self.running if seq not in busy]

    def run(self, draw, seq):
        need = seq.known - seq.computed
        if not need or seq.known >= seq.max_total:
            return
        count = self.kv.cut(seq, draw.randint(1, need))
        while True:
            free, held = self.kv.device.num_free, list(seq.blocks)
            wanted = blocks_for(seq.computed + count, self.size) - len(held)
            if self.kv.grow(seq, seq.computed + count):
                break
            assert wanted > free and seq.blocks == held
            victim = draw.choice(self.idle())
            self.preempt(draw, victim)
            if victim is seq:
                return
        self.add_row(seq, count)

    def add_row(self, seq, count):
        start = seq.computed
        seq.computed += count
        wants = seq.computed == seq.known < seq.max_total
        seq.pending += wants
        self.rows.append((seq, seq.slot, start, count, wants))
        if count > 1:
            self.kv.publish(seq)

    def preempt(self, draw, seq):
        kv, blocks = self.kv, list(seq.blocks)
        copies, out = kv.swap_cost(seq)[0] - bool(kv.states), kv.stats.swapped_out_blocks
        if draw.random() < 0.7 and kv.swap_out(seq):
            assert kv.stats.swapped_out_blocks - out == copies
            assert len(seq.swapped) == len(blocks) and not seq.blocks
        else:
            assert seq.blocks == blocks and not seq.swapped  # no swap changes nothing
            kv.release(seq)
            seq.computed = 0
        self.leave(seq)
        self.waiting.append(seq)

    def admit(self, draw, seq):
        kv, known = self.kv, seq.known
        prefix = kv.match(seq)
        if seq.swapped:
            missing = kv.missing_to_swap_in(seq, known)
        else:
            missing = kv.missing(seq, prefix, known)
        if not kv.fits(missing) or prefix.coming:
            return
        self.waiting.remove(seq)
        self.running.append(seq)
        self.slots += 1
        seq.slot = self.slots
        if seq.swapped:
            computed = seq.computed
            kv.swap_in(seq)
            assert seq.computed == computed and len(seq.blocks) == blocks_for(computed, self.size)
        else:
            kv.claim(seq, prefix)
            assert seq.computed == len(prefix.blocks) * self.size < seq.known
        seq.prefill_end = known
        count = kv.cut(seq, draw.randint(1, known - seq.computed))
        grown = kv.grow(seq, seq.computed + count)
        assert grown, "what was missing is not enough"
        self.add_row(seq, count)

    def finish(self, seq):
        self.kv.release(seq)
        if seq in self.running:
            self.leave(seq)
        else:
            self.waiting.remove(seq)
        self.all.remove(seq)

    def leave(self, seq):
        self.running.remove(seq)
        self.tables.pop(seq.slot, None)
        self.state_of.pop(seq.slot, None)
        seq.slot = -1

    # ---- what the workers do ----

    def carry_out(self, draw):
        cells, copies = self.kv.drain()
        for slot, index, block in cells.tolist():
            table = self.tables.setdefault(slot, [])
            assert index == len(table)
            table.append(block)
        self.copy(copies, self.device, self.cpu)
        moves = self.kv.drain_states()
        if moves is not None:
            self.state_of |= dict(moves.cells.tolist())
            self.copy(moves.copies, self.states, self.cpu_states)
            self.copy_side_by_side(moves.forks, [*self.states, 0], self.states)
        for row in self.rows:
            self.compute(draw, *row)
        self.rows = []
        self.check_memory()

    def copy(self, copies, device, cpu):
        self.copy_side_by_side(copies.out, device, cpu)
        self.copy_side_by_side(copies.in_, cpu, device)

    def copy_side_by_side(self, pairs, source, target):
        assert len({b for _, b in pairs.tolist()}) == len(pairs), "two copies to one unit"
        for content, b in [(source[a], b) for a, b in pairs.tolist()]:
            target[b] = list(content) if isinstance(content, list) else content

    def compute(self, draw, seq, slot, start, count, wants):
        written, table = self.written[seq], self.tables[slot]
        chains = self.chains(written)
        if self.states:
            state = self.state_of[slot]
            assert state == seq.live
            assert self.states[state] == (chains[start - 1] if start else 0), "a stale state"
            self.states[state] = chains[start + count - 1]
        cells = [self.device[block] for block in table]
        assert table == seq.blocks and len(set(table)) == len(table)
        held = [cells[i // self.size][i % self.size] for i in range(start)]
        assert held == chains[:start], "a wrong or stale block"
        for i in range(start, start + count):
            cells[i // self.size][i % self.size] = chains[i]
        if wants:
            token = draw.randrange(3)
            written.append(token)
            self.results.append((seq, token))

    def chains(self, tokens):
        chain, out = 0, []
        for token in tokens:
            chain = extend(chain, token)
            out.append(chain)
        return out

    def check_memory(self):
        """Between two plans: counts are exact, and what is cached is what its hash says."""
        kv = self.kv
        held = Counter(b for seq in self.all for b in seq.blocks)
        swapped = Counter(b for seq in self.all for b in seq.swapped)
        holding = [(kv.device, held), (kv.cpu, swapped)]
        memories = [(kv.device, self.device), (kv.cpu, self.cpu)]
        if kv.states is not None:
            tiers = kv.states.tiers
            holding.append((tiers.device, Counter(seq.live for seq in self.all)))
            holding.append((tiers.cpu, Counter(seq.parked for seq in self.all)))
            memories += [(tiers.device, self.states), (tiers.cpu, self.cpu_states)]
        for pool, holders in holding:
            counts = [pool.references(b) for b in range(pool.num_blocks)]
            assert counts == [holders[b] for b in range(pool.num_blocks)]
        known = {}
        for seq, written in self.written.items():
            chains = self.chains(written)
            hashes = seq.hashes(len(seq.tokens) // self.size, self.size)
            for i, block_hash in enumerate(hashes):
                known[block_hash] = chains[i * self.size : (i + 1) * self.size]
        for pool, memory in memories:
            for block in range(pool.num_blocks):
                block_hash = pool.hash_of(block)
                if block_hash is not None:
                    assert self.kv.prefix_caching
                    content = known[block_hash]
                    content = content if isinstance(memory[block], list) else content[-1]
                    assert memory[block] == content, "cached content is not its hash's"

    @invariant()
    def consistent(self):
        if hasattr(self, "kv"):
            for pool in self.pools():
                pool.check()
            for seq in self.all:
                assert not (seq.blocks and seq.swapped)
                assert all(self.kv.device.references(b) for b in seq.blocks)
                assert all(self.kv.cpu.references(b) for b in seq.swapped)

    def teardown(self):
        if hasattr(self, "kv"):
            for seq in self.all:
                self.kv.release(seq)
            self.kv.drain()
            self.kv.drain_states()
            for pool in self.pools():
                assert pool.num_held == 0, "a block or a state has leaked"
                pool.check()
            KVMachine.done.update(vars(self.kv.stats))
            if self.kv.states is not None:
                stats = vars(self.kv.states.stats)
                KVMachine.done.update({f"states {name}": n for name, n in stats.items()})
                KVMachine.done["states kept"] += self.kv.states.kept


def test_block_pool_agrees_with_a_plain_model():
    run_state_machine_as_test(PoolMachine, settings=settings(COMMON, max_examples=60))


def test_kv_blocks_hold_what_they_should():
    KVMachine.done.clear()
    for _ in range(5):
        run_state_machine_as_test(KVMachine, settings=settings(COMMON, max_examples=200))
        if min(KVMachine.done.values()) > 20:
            break
    assert min(KVMachine.done.values()) > 20, KVMachine.done  # it did everything, and often


def test_a_prefix_is_held_whole_before_a_part_of_it_is_promoted():
    """Promoting its first block evicts another's from the device, which must not be given the
    CPU block that holds this one's second."""
    kv = KVBlocks(3, 2, 1, prefix_caching=True)

    def run(tokens):
        seq = Sequence(begin("", tokens, SamplingParams()), max_total=9)
        prefix = kv.match(seq)
        kv.claim(seq, prefix)
        assert kv.grow(seq, len(tokens))
        seq.computed = len(tokens)
        kv.publish(seq)
        _, copies = kv.drain()
        kv.release(seq)
        return prefix, copies

    run([1, 2, 3])
    run([4, 5, 6])  # now the device has these, and the CPU blocks 1 and 2
    prefix, copies = run([1, 2, 3])
    assert [on_device for on_device, _ in prefix.blocks] == [False, False]
    assert copies.in_[:, 0].tolist() == [block for _, block in prefix.blocks]
    assert not set(copies.out[:, 1].tolist()) & set(copies.in_[:, 0].tolist())


@pytest.mark.parametrize("num_cpu, fits", [(3, False), (4, True)])
def test_a_swap_out_needs_room_beside_the_copies_that_are_there(num_cpu, fits):
    """The CPU copies left by the last swap are used again, so they are no room for what is new."""
    kv = KVBlocks(6, num_cpu, 1, prefix_caching=True)
    seq = Sequence(begin("", [1, 2, 3], SamplingParams()), max_total=9)
    seq.computed = 3
    assert kv.grow(seq, 3)
    kv.publish(seq)
    assert kv.swap_out(seq)
    kv.drain()
    kv.device.forget_all()
    kv.swap_in(seq)
    assert len(kv.drain()[1].in_) == 3
    seq.tokens.append(4)
    seq.computed = 4
    assert kv.grow(seq, 4)
    blocks = list(seq.blocks)
    assert kv.swap_out(seq) == fits
    out = kv.drain()[1].out
    if fits:
        assert len(seq.swapped) == 4 and out[:, 0].tolist() == blocks[3:]
    else:
        assert seq.blocks == blocks and not len(out) and kv.cpu.num_held == 0
