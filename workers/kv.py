"""The KV blocks' memory in both tiers, and the copies between them.

On a CPU a copy is done when ``copy`` returns. On CUDA the blocks of the device are touched by the
step's own stream alone, in the order of the plans, and the CPU blocks by a side stream alone, in
the same order. Between the two lie small staging buffers on the device:

    out: device blocks -> staging (a gather, step's stream) -> CPU blocks (side stream)
    in:  CPU blocks -> staging (side stream) -> device blocks (a scatter, step's stream)

So the slow way over the bus overlaps with compute: a copy out with this step's, a copy in with
that of the step before, which still runs when the plan comes. A device block may be written again
as soon as it was gathered, and no CPU block is read or overwritten before the copies before it.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.plan import Copies, CopyTimes, Ints, StateMoves
from workers.kernels.memory import huge_tensor
from workers.layers.memory import Memory
from workers.messages import Units
from workers.sampling_table import on_device

STAGING_BYTES = 256 << 20  # each way, at most
ALIGNMENT = 16  # bytes: of a layer's part of a CPU block


class KVCache:
    """What this rank's layers keep of sequences: blocks, and states where layers have any, on the
    device, and on the CPU units with the same content.

    ``layers[i]`` is the i-th layer's, a tensor [units, ...] as ``memories[i]`` allocates it.
    """

    def __init__(self, memories: Sequence[Memory], units: Units, device: torch.device) -> None:
        self.layers = [
            memory.allocate(units.states if memory.state else units.blocks) for memory in memories
        ]
        pairs = [
            (memory, layer)
            for memory, layer in zip(memories, self.layers, strict=True)
            if memory.unit_bytes
        ]
        blocks = [layer for memory, layer in pairs if not memory.state]
        self._tiers = make_tiers(blocks, units.cpu_blocks, device)
        self._states = [layer for memory, layer in pairs if memory.state]
        self._state_tiers = make_tiers(self._states, units.cpu_states, device)
        self._device = device
        self.num_measured = min(64, units.blocks, units.cpu_blocks)

    def copy(self, copies: Copies) -> None:
        """Carry out a plan's copies of blocks: out, then in."""
        self._tiers.copy(copies)

    def move_states(self, moves: StateMoves) -> None:
        """Carry out what a plan says of states."""
        if not self._states:  # another stage of the pipeline has them
            return
        self._state_tiers.copy(moves.copies)
        new = moves.forks[:, 0] < 0
        sources, targets = on_device(moves.forks[~new], self._device).long().unbind(1)
        zeros = on_device(moves.forks[new, 1], self._device).long()
        for layer in self._states:
            layer[targets] = layer[sources]
            layer.index_fill_(0, zeros, 0)

    def copied(self) -> CopyTimes:
        """The copies of blocks between the tiers that ended since the last call."""
        self._state_tiers.copied()  # not told, but not to be remembered either
        return self._tiers.copied()

    def measure(self) -> tuple[float, float]:
        """(seconds to copy a block out, seconds to copy one in); blocks' contents are lost."""
        num = self.num_measured
        if num == 0:
            return float("inf"), float("inf")
        pairs = torch.arange(num, dtype=torch.int32)[:, None].expand(-1, 2).numpy()
        for _ in range(2):  # the first touches the memory
            self._tiers.copy_out(pairs)
            self._tiers.copy_in(pairs)
            self._tiers.wait()
            seen = self._tiers.copied()
        return seen.seconds_out / seen.blocks_out, seen.seconds_in / seen.blocks_in


class Row:
    """How one unit of every layer stands in a row of bytes, side by side."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self._kinds = [(layer.dtype, layer[0].numel()) for layer in layers]
        sizes = [-(-count * dtype.itemsize // ALIGNMENT) for dtype, count in self._kinds]
        self._starts = [ALIGNMENT * start for start in itertools.accumulate(sizes, initial=0)]

    @property
    def bytes(self) -> int:
        return self._starts[-1]

    def split(self, rows: Tensor) -> list[Tensor]:
        """Each layer's part [n, elements] of rows [n, bytes]."""
        return [
            rows[:, start : start + count * dtype.itemsize].view(dtype)
            for start, (dtype, count) in zip(self._starts, self._kinds, strict=False)
        ]


def make_tiers(layers: Sequence[Tensor], num_cpu_units: int, device: torch.device) -> "TierCopies":
    """The copies between the units of ``layers``, tensors [n, ...], and as many CPU units as asked
    for, whose memory is taken as they are written, so that start-up stays short."""
    row, flat = Row(layers), [layer.view(len(layer), -1) for layer in layers]
    shape = num_cpu_units, row.bytes
    if device.type == "cuda":
        cpu = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return CudaTiers(flat, row, cpu, device)
    return CPUTiers(flat, row.split(huge_tensor(shape, torch.uint8)))


class TierCopies(ABC):
    """Units of both tiers."""

    def copy(self, copies: Copies) -> None:
        """Out, then in."""
        if len(copies.out):
            self.copy_out(copies.out)
        if len(copies.in_):
            self.copy_in(copies.in_)

    @abstractmethod
    def copy_out(self, pairs: Ints) -> None:
        """[n, 2] device unit to CPU unit."""

    @abstractmethod
    def copy_in(self, pairs: Ints) -> None:
        """[n, 2] CPU unit to device unit."""

    @abstractmethod
    def copied(self) -> CopyTimes:
        """What ended since the last call. Does not wait: what still runs is told later."""

    @abstractmethod
    def wait(self) -> None:
        """Until all copies are done."""


class CPUTiers(TierCopies):
    """Both tiers in host memory: of each layer [n, elements]."""

    def __init__(self, layers: list[Tensor], cpu: list[Tensor]) -> None:
        self._layers, self._cpu = layers, cpu
        self._blocks, self._seconds = [0, 0], [0.0, 0.0]  # in, out

    def copy_out(self, pairs: Ints) -> None:
        self._copy(True, pairs, self._layers, self._cpu)

    def copy_in(self, pairs: Ints) -> None:
        self._copy(False, pairs, self._cpu, self._layers)

    def _copy(self, out: bool, pairs: Ints, sources: list[Tensor], targets: list[Tensor]) -> None:
        started = time.perf_counter()
        source, target = torch.from_numpy(pairs).long().unbind(1)
        for layer, other in zip(sources, targets, strict=True):
            other[target] = layer[source]
        self._blocks[out] += len(pairs)
        self._seconds[out] += time.perf_counter() - started

    def copied(self) -> CopyTimes:
        blocks, seconds = self._blocks, self._seconds
        self._blocks, self._seconds = [0, 0], [0.0, 0.0]
        return CopyTimes(blocks[True], seconds[True], blocks[False], seconds[False])

    def wait(self) -> None:
        pass


class CudaTiers(TierCopies):
    """Device blocks and pinned CPU blocks, with the copies on a side stream.

    Every event is recorded and waited for by streams; the host waits for nothing.
    """

    def __init__(self, layers: list[Tensor], row: Row, cpu: Tensor, device: torch.device) -> None:
        self._layers = layers
        self._cpu = cpu
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._room = max(1, min(len(cpu), STAGING_BYTES // max(1, row.bytes)))
        shape = self._room if len(cpu) else 0, row.bytes
        self._out = torch.empty(shape, dtype=torch.uint8, device=device)
        self._in = torch.empty(shape, dtype=torch.uint8, device=device)
        self._out_parts, self._in_parts = row.split(self._out), row.split(self._in)
        self._out_free = _event()  # the side stream has read all of ``_out``
        self._in_free = _event()  # the steps' stream has read all of ``_in``
        self._timed: deque[tuple[bool, int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def copy_out(self, pairs: Ints) -> None:
        main, side = torch.cuda.current_stream(self._device), self._side
        for part in self._parts(pairs):
            source = self._upload(part[:, 0])
            main.wait_event(self._out_free)
            for layer, staged in zip(self._layers, self._out_parts, strict=True):
                staged[: len(part)] = layer[source]
            gathered = _event()
            gathered.record(main)
            side.wait_event(gathered)
            started = self._start()
            with torch.cuda.stream(side):
                for at, length, block in _runs(part[:, 1]):
                    content = self._out[at : at + length]
                    self._cpu[block : block + length].copy_(content, non_blocking=True)
            self._out_free.record(side)
            self._end(True, len(part), started)

    def copy_in(self, pairs: Ints) -> None:
        main, side = torch.cuda.current_stream(self._device), self._side
        for part in self._parts(pairs):
            target = self._upload(part[:, 1])
            side.wait_event(self._in_free)
            started = self._start()
            with torch.cuda.stream(side):
                for at, length, block in _runs(part[:, 0]):
                    content = self._cpu[block : block + length]
                    self._in[at : at + length].copy_(content, non_blocking=True)
            main.wait_event(self._end(False, len(part), started))
            for layer, staged in zip(self._layers, self._in_parts, strict=True):
                layer[target] = staged[: len(part)]
            self._in_free.record(main)

    def copied(self) -> CopyTimes:
        blocks, seconds = [0, 0], [0.0, 0.0]
        while self._timed and self._timed[0][3].query():  # type: ignore[no-untyped-call]
            out, num, started, ended = self._timed.popleft()
            blocks[out] += num
            seconds[out] += started.elapsed_time(ended) / 1000
        return CopyTimes(blocks[True], seconds[True], blocks[False], seconds[False])

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def _parts(self, pairs: Ints) -> Iterator[Ints]:
        """Pieces that fit the staging buffer, in the order of their CPU blocks."""
        for at in range(0, len(pairs), self._room):
            yield pairs[at : at + self._room]

    def _upload(self, blocks: Ints) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(blocks)).long().pin_memory()
        return host.to(self._device, non_blocking=True)

    def _start(self) -> torch.cuda.Event:
        started = _event(timing=True)
        started.record(self._side)
        return started

    def _end(self, out: bool, num: int, started: torch.cuda.Event) -> torch.cuda.Event:
        ended = _event(timing=True)
        ended.record(self._side)
        self._timed.append((out, num, started, ended))
        return ended


def _event(timing: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]


def _runs(blocks: Ints) -> Iterator[tuple[int, int, int]]:
    """(index, length, first block) of each run of blocks that follow each other; not of none."""
    starts = np.flatnonzero(np.diff(blocks, prepend=blocks[:1] - 2) != 1)
    ends = np.append(starts[1:], len(blocks))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield start, end - start, int(blocks[start])
