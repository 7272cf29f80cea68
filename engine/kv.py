"""Which block holds what: both tiers of KV blocks, and the sequences' claims on them.

Device blocks are what steps read and write. CPU blocks hold preempted sequences (swap) and, where
there is room to spare, prefixes evicted from the device. Every change is noted for the plan in
the making: the new cells of block tables and the copies between tiers (``drain`` hands them out).

Of a model with ``states`` a sequence has one beside its blocks, and a prefix is cached where both
are. Whoever asks here need not know which of the two a model has.
"""

from dataclasses import dataclass, field

from engine.blocks import blocks_for
from engine.plan import Copies, Ints, StateMoves, ints
from engine.sequence import Sequence
from engine.states import States
from engine.tiers import Tiers, TierStats


@dataclass
class KVStats(TierStats):
    """Counted since the start."""

    prefix_queries: int = 0  # tokens that were looked up
    prefix_hits: int = 0  # tokens that were found, in either tier


@dataclass(frozen=True)
class Prefix:
    """The longest cached prefix of a sequence: (tier is device, block) for each block.

    Of a model with states, ``shared`` blocks are cached, these and those without a state at the
    end. ``coming``: the plan that is being made computes a state for more of them, which the next
    one will find.
    """

    blocks: list[tuple[bool, int]] = field(default_factory=list)
    shared: int = 0
    coming: bool = False


class KVBlocks:
    """Both pools. Sequences' ``blocks``, ``swapped`` and ``published`` are changed here only."""

    def __init__(
        self,
        num_device_blocks: int,
        num_cpu_blocks: int,
        block_size: int,
        prefix_caching: bool,
        states: States | None = None,
    ) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.states = states
        self.stats = KVStats()
        self._tiers = Tiers(num_device_blocks, num_cpu_blocks, self.stats)
        self.clear()

    def clear(self) -> None:
        """Nobody holds a block, and none holds anything: at the start, and with new workers."""
        self._tiers.clear()
        self.device, self.cpu = self._tiers.device, self._tiers.cpu
        self._cells: list[tuple[int, int, int]] = []
        if self.states is not None:
            self.states.clear()

    @property
    def promote(self) -> bool:
        """Whether copying in is cheaper than computing, which the scheduler says."""
        return self._tiers.promote

    @promote.setter
    def promote(self, pays: bool) -> None:
        self._tiers.promote = pays
        if self.states is not None:
            self.states.tiers.promote = pays

    def fits(self, num_blocks: int) -> bool:
        """Whether a sequence that takes so many free device blocks can be admitted."""
        return num_blocks <= self.device.num_free and (self.states is None or self.states.room)

    def settle(self) -> None:
        """Before a plan is made."""
        if self.states is not None:
            self.states.settle()

    def cut(self, seq: Sequence, count: int) -> int:
        """Of the next ``count`` tokens of a prompt as many as one step may compute."""
        return count if self.states is None else self.states.cut(seq, count)

    # ---- growing and releasing ----

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Give a running sequence blocks for ``num_tokens``; False (and no change) if too few."""
        wanted = blocks_for(num_tokens, self.block_size) - len(seq.blocks)
        if wanted > self.device.num_free:
            return False
        for _ in range(wanted):
            self._append(seq, self._tiers.take())
        return True

    def publish(self, seq: Sequence) -> None:
        """Offer the sequence's full blocks of known tokens to the prefix cache."""
        if not self.prefix_caching:
            return
        full = min(seq.computed, len(seq.tokens)) // self.block_size
        if full > seq.published:
            hashes = seq.hashes(full, self.block_size)
            for i in range(seq.published, full):
                self.device.publish(seq.blocks[i], hashes[i])
            seq.published = full
            if self.states is not None and seq.computed == full * self.block_size:
                self.states.note(seq)

    def withdraw(self, seq: Sequence) -> None:
        """Take a sequence's content out of the prefix cache, in both tiers, whoever wrote it.

        For one whose logits were not finite: any of the keys and values that they came from may be
        to blame, and whoever were given these would fail too.
        """
        if not self.prefix_caching:
            return
        hashes = seq.hashes(len(seq.tokens) // self.block_size, self.block_size)
        for block_hash in hashes:
            self._tiers.forget(block_hash)
        if self.states is not None:
            self.states.withdraw(seq, hashes)

    def release(self, seq: Sequence) -> None:
        """Give up everything that the sequence holds, in both tiers.

        Its last blocks are freed first, so that the common beginnings of prompts live longest.
        """
        for block in reversed(seq.blocks):
            self.device.release(block)
        for block in reversed(seq.swapped):
            self.cpu.release(block)
        seq.blocks, seq.swapped, seq.published = [], [], 0
        if self.states is not None:
            self.states.release(seq)

    # ---- the prefix cache ----

    def match(self, seq: Sequence) -> Prefix:
        """The longest cached prefix of its known tokens, in either tier; takes nothing.

        The last known token is always left to compute: its hidden state is needed.
        """
        if not (self.prefix_caching and seq.wants_cache):
            return Prefix()
        most = (len(seq.tokens) - 1) // self.block_size
        hashes = seq.hashes(most, self.block_size)
        found: list[tuple[bool, int]] = []
        for block_hash in hashes[:most]:
            where = self._tiers.find(block_hash)
            if where is None:
                break
            found.append(where)
        if self.states is None:
            return Prefix(found)
        count, coming = self.states.match(len(found), hashes)
        return Prefix(found[:count], len(found), coming)

    def missing(self, seq: Sequence, prefix: Prefix, num_tokens: int) -> int:
        """How many free device blocks it takes to admit ``seq`` with ``num_tokens``."""
        held = sum(on_device and not self.device.is_free(b) for on_device, b in prefix.blocks)
        return blocks_for(num_tokens, self.block_size) - held

    def claim(self, seq: Sequence, prefix: Prefix) -> None:
        """Start a sequence on its cached prefix. The caller looked at ``missing`` first."""
        self.stats.prefix_queries += len(seq.tokens)
        self.stats.prefix_hits += len(prefix.blocks) * self.block_size
        for on_device, block in prefix.blocks:  # hold them all before anything can be evicted
            (self.device if on_device else self.cpu).share(block)
        hashes = seq.hashes(len(prefix.blocks), self.block_size)
        for (on_device, block), block_hash in zip(prefix.blocks, hashes, strict=False):
            if not on_device:
                block = self._tiers.copy_in(block, block_hash)
                self.stats.promoted_blocks += 1
            self._append(seq, block)
        seq.published = len(prefix.blocks)
        seq.computed = seq.published * self.block_size
        if self.states is not None:
            self.states.claim(seq, hashes[seq.published - 1] if seq.published else None)
            if self.prefix_caching:
                last = (len(seq.tokens) - 1) // self.block_size
                self.states.mark(seq, prefix.shared, last)

    # ---- swapping ----

    def num_shared(self, seq: Sequence) -> int:
        """How many of its leading blocks others hold too: what is shared is a common prefix."""
        low, high = 0, len(seq.blocks)
        while low < high:
            middle = (low + high) // 2
            if self.device.references(seq.blocks[middle]) > 1:
                low = middle + 1
            else:
                high = middle
        return low

    def swap_cost(self, seq: Sequence) -> tuple[int, int]:
        """(blocks to copy out, blocks to copy in again) if ``seq`` is swapped out now.

        Content that a CPU block has already is not copied out. What others hold is likely to be
        on the device still when the sequence comes back, and then is not copied in. A state counts
        as as many blocks as it has bytes for.
        """
        copies = sum(self._cpu_twin(seq, i) is None for i in range(len(seq.blocks)))
        state = 0 if self.states is None else self.states.weight
        return copies + state, len(seq.blocks) - self.num_shared(seq) + state

    def swap_out(self, seq: Sequence) -> bool:
        """Move what a sequence has to the CPU; False (and no change) if there is no room."""
        if self.states is not None and not self.states.can_park:
            return False
        twins = [self._cpu_twin(seq, i) for i in range(len(seq.blocks))]
        reserved = sum(t is not None and self.cpu.is_free(t) for t in twins)
        if sum(t is None for t in twins) > self.cpu.num_free - reserved:
            return False
        for twin in twins:
            if twin is not None:
                self.cpu.share(twin)
        for block, twin in zip(seq.blocks, twins, strict=True):
            if twin is None:
                twin = self._tiers.copy_out(block)
                block_hash = self.device.hash_of(block)
                if block_hash is not None:
                    self.cpu.publish(twin, block_hash)
            seq.swapped.append(twin)
        for block in reversed(seq.blocks):
            self.device.release(block)
        seq.blocks, seq.published = [], 0
        if self.states is not None:
            self.states.swap_out(seq)
        return True

    def missing_to_swap_in(self, seq: Sequence, num_tokens: int) -> int:
        """How many free device blocks it takes to bring ``seq`` back and grow to ``num_tokens``."""
        held = sum(
            (b := self._device_twin(c)) is not None and not self.device.is_free(b)
            for c in seq.swapped
        )
        return blocks_for(num_tokens, self.block_size) - held

    def swap_in(self, seq: Sequence) -> None:
        """Bring a swapped sequence back. The caller looked at ``missing_to_swap_in`` first."""
        twins = [self._device_twin(c) for c in seq.swapped]
        for twin in twins:
            if twin is not None:
                self.device.share(twin)
        for cpu_block, twin in zip(seq.swapped, twins, strict=True):
            if twin is None:
                twin = self._tiers.copy_in(cpu_block, self.cpu.hash_of(cpu_block))
                self.stats.swapped_in_blocks += 1
            else:
                self.cpu.release(cpu_block)
            self._append(seq, twin)
        seq.swapped = []
        if self.states is not None:
            self.states.swap_in(seq)
        # Blocks with a hash lead; those that were computed since the last publish have none yet.
        while (
            seq.published < len(seq.blocks)
            and self.device.hash_of(seq.blocks[seq.published]) is not None
        ):
            seq.published += 1

    # ---- the plan in the making ----

    def drain(self) -> tuple[Ints, Copies]:
        """The cells and copies noted since the last call, for the plan."""
        cells = ints(self._cells).reshape(-1, 3)
        self._cells = []
        return cells, self._tiers.drain()

    def drain_states(self) -> StateMoves | None:
        """The same of the states; None if there is nothing."""
        return None if self.states is None else self.states.drain()

    def _append(self, seq: Sequence, block: int) -> None:
        self._cells.append((seq.slot, len(seq.blocks), block))
        seq.blocks.append(block)

    def _cpu_twin(self, seq: Sequence, index: int) -> int | None:
        block_hash = self.device.hash_of(seq.blocks[index])
        return None if block_hash is None else self.cpu.find(block_hash)

    def _device_twin(self, cpu_block: int) -> int | None:
        block_hash = self.cpu.hash_of(cpu_block)
        return None if block_hash is None else self.device.find(block_hash)
