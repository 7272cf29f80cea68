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

import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engine.plan import Copies, CopyTimes, Ints
from workers.attention.base import AttentionBackend
from workers.kernels.memory import huge_tensor

STAGING_BYTES = 256 << 20  # each way, at most


class KVCache:
    """Keys and values of this rank's layers: device blocks and CPU blocks of the same content.

    ``layers[i]`` is the i-th layer's cache, a tensor [num_blocks, ...] as its backend lays it out.
    A CPU block holds all layers' parts side by side: [num_layers, ...].
    """

    def __init__(
        self,
        backend: AttentionBackend,
        num_layers: int,
        num_device_blocks: int,
        num_cpu_blocks: int,
        device: torch.device,
    ) -> None:
        self.layers = [backend.allocate(num_device_blocks) for _ in range(num_layers)]
        first = self.layers[0]
        # Not initialised: memory is taken as blocks are written, or see ``Prefault``, and start-up
        # stays short.
        shape = num_cpu_blocks, num_layers, *first.shape[1:]
        self._tiers: CudaTiers | CPUTiers
        if device.type == "cuda":
            cpu = torch.empty(shape, dtype=first.dtype, pin_memory=True)
            self._tiers = CudaTiers(self.layers, cpu, device)
        else:
            self._tiers = CPUTiers(self.layers, huge_tensor(shape, first.dtype))
        self.num_measured = min(64, num_device_blocks, num_cpu_blocks)

    def copy(self, copies: Copies) -> None:
        """Carry out a plan's copies: out, then in."""
        if len(copies.out):
            self._tiers.copy_out(copies.out)
        if len(copies.in_):
            self._tiers.copy_in(copies.in_)

    def copied(self) -> CopyTimes:
        """The copies between the tiers that ended since the last call."""
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


class CPUTiers:
    """Both tiers in host memory."""

    def __init__(self, layers: list[Tensor], cpu: Tensor) -> None:
        self._layers = layers
        self._cpu = list(cpu.unbind(1))  # by layer
        self._blocks, self._seconds = [0, 0], [0.0, 0.0]  # in, out

    def copy_out(self, pairs: Ints) -> None:
        """[n, 2] device block to CPU block."""
        self._copy(True, pairs, self._layers, self._cpu)

    def copy_in(self, pairs: Ints) -> None:
        """[n, 2] CPU block to device block."""
        self._copy(False, pairs, self._cpu, self._layers)

    def _copy(self, out: bool, pairs: Ints, sources: list[Tensor], targets: list[Tensor]) -> None:
        started = time.perf_counter()
        source, target = torch.from_numpy(pairs).long().unbind(1)
        for layer, other in zip(sources, targets, strict=True):
            other[target] = layer[source]
        self._blocks[out] += len(pairs)
        self._seconds[out] += time.perf_counter() - started

    def copied(self) -> CopyTimes:
        """Since the last call."""
        blocks, seconds = self._blocks, self._seconds
        self._blocks, self._seconds = [0, 0], [0.0, 0.0]
        return CopyTimes(blocks[True], seconds[True], blocks[False], seconds[False])

    def wait(self) -> None:
        """Until all copies are done: they are."""


class CudaTiers:
    """Device blocks and pinned CPU blocks, with the copies on a side stream.

    Every event is recorded and waited for by streams; the host waits for nothing.
    """

    def __init__(self, layers: list[Tensor], cpu: Tensor, device: torch.device) -> None:
        self._layers = layers
        self._cpu = cpu
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        block_bytes = cpu[0].nbytes if len(cpu) else 1
        self._room = max(1, min(len(cpu), STAGING_BYTES // block_bytes))
        shape = (self._room if len(cpu) else 0, *cpu.shape[1:])
        self._out = torch.empty(shape, dtype=cpu.dtype, device=device)
        self._in = torch.empty(shape, dtype=cpu.dtype, device=device)
        self._out_free = _event()  # the side stream has read all of ``_out``
        self._in_free = _event()  # the steps' stream has read all of ``_in``
        self._timed: deque[tuple[bool, int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def copy_out(self, pairs: Ints) -> None:
        """[n, 2] device block to CPU block."""
        main, side = torch.cuda.current_stream(self._device), self._side
        for part in self._parts(pairs):
            source = self._upload(part[:, 0])
            main.wait_event(self._out_free)
            for number, layer in enumerate(self._layers):
                self._out[: len(part), number] = layer[source]
            gathered = _event()
            gathered.record(main)
            side.wait_event(gathered)
            started = self._start()
            with torch.cuda.stream(side):
                for at, length, block in _runs(part[:, 1]):
                    staged = self._out[at : at + length]
                    self._cpu[block : block + length].copy_(staged, non_blocking=True)
            self._out_free.record(side)
            self._end(True, len(part), started)

    def copy_in(self, pairs: Ints) -> None:
        """[n, 2] CPU block to device block."""
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
            for number, layer in enumerate(self._layers):
                layer[target] = self._in[: len(part), number]
            self._in_free.record(main)

    def copied(self) -> CopyTimes:
        """Since the last call. Does not wait: what still runs is told later."""
        blocks, seconds = [0, 0], [0.0, 0.0]
        while self._timed and self._timed[0][3].query():  # type: ignore[no-untyped-call]
            out, num, started, ended = self._timed.popleft()
            blocks[out] += num
            seconds[out] += started.elapsed_time(ended) / 1000
        return CopyTimes(blocks[True], seconds[True], blocks[False], seconds[False])

    def wait(self) -> None:
        """Until all copies are done."""
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
