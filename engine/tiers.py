"""Units of one kind in both tiers, on the device and on the CPU, and the copies between them.

KV blocks are such units, and states are. Every copy is noted for the plan in the making (``drain``
hands them out). The plan's copies run out, then in, then what is copied within the device, then
the rows compute. Hence the one rule here: what is the source of a copy in, or within, stays held
until ``drain``, so that nothing of the same plan overwrites it first.
"""

from dataclasses import dataclass

from engine.blocks import BlockHash, BlockPool
from engine.plan import Copies, pairs


@dataclass
class TierStats:
    """Units moved between the tiers, counted since the start."""

    promoted_blocks: int = 0
    demoted_blocks: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0


class Tiers:
    """Both pools. ``promote`` says whether copying a unit in is cheaper than computing it."""

    def __init__(self, num_device: int, num_cpu: int, stats: TierStats) -> None:
        self.promote = True
        self.stats = stats
        self._sizes = num_device, num_cpu
        self.clear()

    def clear(self) -> None:
        """Nobody holds a unit, and none holds anything."""
        self.device, self.cpu = map(BlockPool, self._sizes)
        self._out: list[tuple[int, int]] = []
        self._in: list[tuple[int, int]] = []
        self._sources: list[tuple[BlockPool, int]] = []  # held until ``drain``

    def find(self, block_hash: BlockHash) -> tuple[bool, int] | None:
        """(whether it is on the device, unit) of known content in the tier where it is nearest."""
        unit = self.device.find(block_hash)
        if unit is not None:
            return True, unit
        unit = self.cpu.find(block_hash) if self.promote else None
        return None if unit is None else (False, unit)

    def forget(self, block_hash: BlockHash) -> None:
        """Drop content from the prefix cache, wherever it is."""
        for pool in (self.device, self.cpu):
            if (unit := pool.find(block_hash)) is not None:
                pool.forget(unit)

    def take(self) -> int:
        """A free device unit; the content evicted from it moves to a free CPU unit, if any."""
        unit, evicted = self.device.take()
        if evicted is None or not self.promote:
            return unit
        if self.cpu.num_free and self.cpu.find(evicted) is None:
            cpu_unit, _ = self.cpu.take()
            self._out.append((unit, cpu_unit))
            self.cpu.publish(cpu_unit, evicted)
            self.cpu.release(cpu_unit)  # free, but cached
            self.stats.demoted_blocks += 1
        return unit

    def copy_out(self, unit: int) -> int:
        """A CPU unit, held by the caller, that will hold what device unit ``unit`` holds."""
        cpu_unit, _ = self.cpu.take()
        self._out.append((unit, cpu_unit))
        self.stats.swapped_out_blocks += 1
        return cpu_unit

    def copy_in(self, cpu_unit: int, block_hash: BlockHash | None = None) -> int:
        """A device unit that will hold what ``cpu_unit``, held by the caller until now, holds;
        known by ``block_hash``, if that is given."""
        unit = self.take()
        self._in.append((cpu_unit, unit))
        self.let_go(self.cpu, cpu_unit)
        if block_hash is not None:
            self.device.publish(unit, block_hash)
        return unit

    def let_go(self, pool: BlockPool, unit: int) -> None:
        """Release a unit that this plan still copies from, once that is done."""
        self._sources.append((pool, unit))

    def drain(self) -> Copies:
        """The copies between the tiers noted since the last call, for the plan."""
        last = {cpu_unit: unit for unit, cpu_unit in self._out}  # one may be taken twice
        copies = Copies(out=pairs([(u, c) for c, u in last.items()]), in_=pairs(self._in))
        for pool, unit in self._sources:
            pool.release(unit)
        self._out, self._in, self._sources = [], [], []
        return copies
