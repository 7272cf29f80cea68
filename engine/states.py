"""States: what a recurrent layer keeps of a sequence, in a slot of fixed size, and snapshots of it.

A running sequence has one slot, which its rows read and write: its ``live`` state. Where a prefix
may be of use to others, the slot is left as it is, as a snapshot that the prefix cache knows by the
hash of the block that ends there, and the sequence goes on in another slot, into which the state is
copied (a fork). Snapshots are never written: whoever starts from one forks it.

Which ends of blocks are kept: the last one of a prompt, where a longer conversation goes on; the
one up to which a prompt had blocks of another's but no state, as a third one is likely to branch
off there too (a system prompt); the last one that was generated, each in place of the one before;
and, if asked for, every ``interval`` tokens of a prompt. A prompt's steps end there (``cut``).

States cost their requests nothing that they need: a sequence is admitted while there is a slot, a
snapshot is kept while there are two, and what is least recently used goes first. But before that
goes what a sequence has passed: a conversation needs the last of its snapshots only. Those from
which two have started stay.
"""

from collections import Counter
from collections.abc import Sequence as Items

from engine.blocks import BlockHash
from engine.plan import StateMoves, pairs
from engine.sequence import Sequence
from engine.tiers import Tiers, TierStats

ZERO = -1  # the source of a new sequence's state
BRANCH = 2  # sequences that start from a snapshot: prompts branch off there
MOST_COUNTED = 100_000


class States:
    """The slots of both tiers. Sequences' ``live``, ``parked``, ``marks``, ``due`` and ``trail``
    are changed here only.

    ``weight`` is what a state has for bytes, in blocks.
    """

    def __init__(
        self, num_device: int, num_cpu: int, block_size: int, weight: int, interval: int | None
    ) -> None:
        self.stats = TierStats()
        self.kept = 0  # snapshots, since the start
        self.weight = weight
        self.tiers = Tiers(num_device, num_cpu, self.stats)
        self._block_size = block_size
        self._interval = interval
        self.clear()

    def clear(self) -> None:
        """Nobody has a state: at the start, and with new workers."""
        self.tiers.clear()
        self._cells: dict[int, int] = {}  # live state: slot
        self._forks: dict[int, int] = {}  # target: source
        self._due: dict[BlockHash, Sequence] = {}  # whose live state is to be kept as it is
        self._starts = Counter[BlockHash]()  # from a snapshot

    # ---- the prefix cache ----

    def match(self, num_blocks: int, hashes: Items[BlockHash]) -> tuple[int, bool]:
        """How many of a sequence's ``num_blocks`` cached blocks end where there is a state, and
        whether a plan that is being made computes one for more of them."""
        for count in range(num_blocks, 0, -1):
            if hashes[count - 1] in self._due:
                return 0, True
            if self.tiers.find(hashes[count - 1]) is not None:
                return count, False
        return 0, False

    def note(self, seq: Sequence) -> None:
        """The plans so far compute the sequence up to the end of a block."""
        end = seq.computed
        generated = end >= seq.prefill_end
        apart = self._interval is not None and end % self._interval == 0
        if not (generated or apart or end in seq.marks):
            return
        count = end // self._block_size
        block_hash = seq.hashes(count, self._block_size)[count - 1]
        if block_hash not in self._due and self.tiers.device.find(block_hash) is None:
            seq.due = block_hash
            self._due[block_hash] = seq

    def settle(self) -> None:
        """Before a plan is made: keep what is due, and let its owners go on elsewhere."""
        due, self._due = self._due, {}
        device = self.tiers.device
        for block_hash, seq in due.items():
            seq.due = None
            if device.num_free < 2 or device.find(block_hash) is not None:
                continue  # one is for whoever waits
            kept = seq.live
            self._keep(seq, block_hash)
            self._fork(seq, kept)

    def cut(self, seq: Sequence, count: int) -> int:
        """``count`` tokens of a prompt, or fewer, to the next end of a block that is to be kept."""
        start = seq.computed
        ends = [mark for mark in seq.marks if mark > start]
        if self._interval is not None:
            ends.append(start - start % self._interval + self._interval)
        return min([count, *(end - start for end in ends)])

    # ---- what a sequence has ----

    @property
    def room(self) -> bool:
        """Whether one more sequence can have a state."""
        return self.tiers.device.num_free > 0

    @property
    def can_park(self) -> bool:
        """Whether one more state can be swapped out."""
        return self.tiers.cpu.num_free > 0

    def mark(self, seq: Sequence, shared: int, last: int) -> None:
        """Have the state of an admitted sequence kept after its ``last`` full block, and after
        those blocks that it has in common with another."""
        seq.marks = shared * self._block_size, last * self._block_size
        if seq.marks[0] > seq.computed:
            self._count(seq.hashes(shared, self._block_size)[shared - 1], BRANCH)

    def claim(self, seq: Sequence, block_hash: BlockHash | None) -> None:
        """Give an admitted sequence the state known by ``block_hash``, which ``match`` found, or
        without one the first. The caller looked whether there is ``room``."""
        seq.trail = None
        found = None if block_hash is None else self.tiers.find(block_hash)
        if found is None or block_hash is None:
            self._fork(seq, ZERO)
            return
        self._count(block_hash, 1)
        seq.trail = block_hash, seq.computed
        device = self.tiers.device
        on_device, unit = found
        if on_device:
            device.share(unit)
        else:
            self.tiers.cpu.share(unit)
            known = block_hash if device.num_free > 1 else None
            unit = self.tiers.copy_in(unit, known)
            self.stats.promoted_blocks += 1
        if device.num_free:
            self._fork(seq, unit)
        else:  # the last one: no snapshot any longer
            device.forget(unit)
            self._begin(seq, unit)

    def swap_out(self, seq: Sequence) -> None:
        """Move a sequence's state to a CPU slot. The caller looked at ``can_park``."""
        # What this plan is still to fork is where it comes from: copies out are the first.
        seq.parked = self.tiers.copy_out(self._forks.get(seq.live, seq.live))
        self._leave(seq)

    def swap_in(self, seq: Sequence) -> None:
        """Bring a state back. The caller looked whether there is ``room``."""
        self._begin(seq, self.tiers.copy_in(seq.parked))
        self.stats.swapped_in_blocks += 1
        seq.parked = -1

    def release(self, seq: Sequence) -> None:
        """Give up what the sequence has, in both tiers; what is due is kept."""
        if seq.live >= 0:
            self._leave(seq)
        if seq.parked >= 0:
            self.tiers.cpu.release(seq.parked)
            seq.parked = -1

    def withdraw(self, seq: Sequence, hashes: Items[BlockHash]) -> None:
        """Take a sequence's states out of the prefix cache."""
        for block_hash in hashes:
            self.tiers.forget(block_hash)
        if seq.due is not None:
            del self._due[seq.due]
            seq.due = None

    def drain(self) -> StateMoves | None:
        """What was noted since the last call, for the plan; None if there is nothing."""
        copies = self.tiers.drain()
        if not (self._cells or copies):
            return None
        moves = StateMoves(
            cells=pairs([(slot, state) for state, slot in self._cells.items()]),
            copies=copies,
            forks=pairs([(source, target) for target, source in self._forks.items()]),
        )
        self._cells, self._forks = {}, {}
        return moves

    def _begin(self, seq: Sequence, state: int) -> None:
        seq.live = state
        self._cells[state] = seq.slot

    def _fork(self, seq: Sequence, source: int) -> None:
        """Let the sequence go on in a new slot, from what is in ``source``, which it holds."""
        state = self.tiers.take()
        self._forks[state] = source
        if source != ZERO:
            self.tiers.let_go(self.tiers.device, source)
        self._begin(seq, state)

    def _leave(self, seq: Sequence) -> None:
        if seq.due is not None:
            del self._due[seq.due]
            self._keep(seq, seq.due)
            seq.due = None
        self._forks.pop(seq.live, None)
        self._cells.pop(seq.live, None)
        self.tiers.device.release(seq.live)
        seq.live = -1

    def _keep(self, seq: Sequence, block_hash: BlockHash) -> None:
        """Make a sequence's live state a snapshot. What it passed last is not needed by it."""
        device = self.tiers.device
        if not device.publish(seq.live, block_hash):
            return
        self.kept += 1
        passed, seq.trail = seq.trail, (block_hash, seq.computed)
        state = None if passed is None else device.find(passed[0])
        if passed is None or state is None or not device.is_free(state):
            return
        if self._starts[passed[0]] < BRANCH:
            device.age(state)
        if not self._starts[passed[0]] and passed[1] > seq.prefill_end:  # among its own output
            device.forget(state)

    def _count(self, block_hash: BlockHash, starts: int) -> None:
        if len(self._starts) > MOST_COUNTED:
            self._starts.clear()
        self._starts[block_hash] += starts
