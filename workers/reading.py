"""Parts of a checkpoint's tensors on their way to their places, by a thread for each file.

A thread reads its file from the beginning to the end, and of each tensor what is wanted alone. On a
CPU that goes to its place as it is read; on a GPU through two pinned buffers, of which one is
copied while the next one is read. Whatever has no place as it is, because it is to be converted,
packed or decoded, gets memory of its own, of which there is never more than the two largest such
parts need, nor than ``ROOM`` or the largest alone.
"""

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.kernels.memory import mapped_tensor
from workers.tensor_files import CHUNK, Entry, Index, TensorFile, bits

ROOM = 256 << 20  # bytes of parts that have no place; a larger one goes alone


@dataclass(frozen=True)
class Wanted:
    """The part ``at`` of ``tensor`` in ``file``, for parameter ``name``. ``place`` is a contiguous
    tensor that is to hold it as it is, if there is one."""

    name: str
    file: TensorFile
    tensor: str
    at: Index
    place: Tensor | None = None

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.part(self.at)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.entry.dtype.itemsize

    @property
    def own_bytes(self) -> int:
        """Of memory that is taken for it on its way."""
        return self.nbytes if self.place is None else 0


def read(
    files: Iterable[deque[Wanted]], device: torch.device, take: Callable[[Wanted, Tensor], None]
) -> None:
    """Read what is wanted of each file, in its order, and call ``take`` in this thread as it comes:
    with the part, on ``device``. Unless that is its place, keeping it takes memory that is not
    counted. What is read is taken from ``files``, so that a place is gone when everybody else has
    let it go.

    Raises CheckpointError.
    """
    files = [wanted for wanted in files if wanted]
    own = [wanted.own_bytes for wanteds in files for wanted in wanteds]
    total, largest = len(own), max(own, default=0)
    room = _Room(max(largest, min(2 * largest, ROOM)))
    work = _Work(deque(files), room)
    # torch's threads are this rank's share of the cores.
    lanes = [_lane(device) for _ in range(min(len(files), torch.get_num_threads()))]
    threads = [threading.Thread(target=work.run, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        for _ in range(total):
            came = work.done.get()
            if isinstance(came, BaseException):
                raise came
            wanted, part, lane = came
            lane.hand_over(part)
            take(wanted, part)
            size = wanted.own_bytes
            del wanted, part, came
            room.give_back(size)
    finally:
        room.close()
        for thread in threads:
            thread.join()


class _Room:
    """Bytes for parts that have no place; who wants more than are left waits."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """False: nobody wants the parts any longer."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or size <= self._left)
            self._left -= size
            return not self._closed

    def give_back(self, size: int) -> None:
        with self._changed:
            self._left += size
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _Work:
    """Files that no thread has taken, and the parts that came."""

    files: deque[deque[Wanted]]
    room: _Room
    done: "queue.SimpleQueue[tuple[Wanted, Tensor, _Lane] | BaseException]" = field(
        default_factory=queue.SimpleQueue
    )

    def _next(self) -> deque[Wanted] | None:
        try:
            return self.files.popleft()
        except IndexError:
            return None

    def run(self, lane: "_Lane") -> None:
        try:
            with torch.inference_mode():
                while file := self._next():
                    while file:
                        wanted = file.popleft()
                        if not self.room.take(wanted.own_bytes):
                            return
                        self.done.put((wanted, lane.read(wanted), lane))
                        del wanted
        except BaseException as error:
            self.done.put(error)


class _Lane:
    """A thread's way to the places, on a CPU."""

    def read(self, wanted: Wanted) -> Tensor:
        part = wanted.place
        if part is None:
            part = mapped_tensor(wanted.shape, wanted.entry.dtype)
        for at, rows in wanted.entry.chunks(wanted.at):
            wanted.file.read(wanted.tensor, at, bits(part[rows]))
        return part

    def hand_over(self, part: Tensor) -> None:
        """Let the calling thread use ``part``."""


class _CudaLane(_Lane):
    """A thread's way to the places on a GPU: a stream of its own, and two pinned buffers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._buffers = deque(_Pinned() for _ in range(2))

    def read(self, wanted: Wanted) -> Tensor:
        with torch.cuda.stream(self._stream):
            part = wanted.place
            if part is None:
                part = torch.empty(wanted.shape, dtype=wanted.entry.dtype, device=self._device)
            for at, rows in wanted.entry.chunks(wanted.at):
                buffer = self._buffers[0]
                self._buffers.rotate()
                host = buffer.take(part[rows])
                wanted.file.read(wanted.tensor, at, bits(host))
                part[rows].copy_(host, non_blocking=True)
                buffer.copied.record()
        return part

    def hand_over(self, part: Tensor) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        part.record_stream(current)


class _Pinned:
    """A buffer that was ``copied`` when the event says so."""

    def __init__(self) -> None:
        self._memory = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def take(self, like: Tensor) -> Tensor:
        """A tensor ``like`` that one in it, when it is free."""
        self.copied.synchronize()
        if like.nbytes > len(self._memory):
            self._memory = torch.empty(like.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._memory[: like.nbytes].view(like.dtype).view(like.shape)


def _lane(device: torch.device) -> _Lane:
    return _CudaLane(device) if device.type == "cuda" else _Lane()
