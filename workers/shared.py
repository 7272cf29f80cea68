"""Groups and pipelines of ranks on one host, through memory that they share.

An all-reduce takes some 10 µs, where Gloo takes hundreds: see kernels/group.h. The memory has no
name (see channel.py), so none is ever left behind.
"""

import ctypes
import mmap
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.channel import RingReceiver, RingSender
from workers.kernels.build import Library
from workers.parallel import Group, Pipeline

CHUNK_BYTES = 1 << 20  # of a rank's buffer; larger tensors take several rounds
LINE_BYTES = 128
PIPELINE_BYTES = 16 << 20
SPINS = 200  # looks at the ring before a stage sleeps


class GroupMemory(ctypes.Structure):
    """``GroupMemory`` of group.h."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int),
        ("chunk", ctypes.c_int64),
        ("round", ctypes.c_uint32),
    ]


class SharedMemory:
    """A group's memory in the eyes of one rank; rank 0 makes it and the others open ``path``."""

    def __init__(self, size: int, rank: int, path: str | None = None) -> None:
        if path is None:
            self._file = os.memfd_create("manta-group", os.MFD_CLOEXEC)
            os.ftruncate(self._file, size * (LINE_BYTES + 2 * CHUNK_BYTES))
        else:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._file, 0)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.state = GroupMemory(base, rank, size, CHUNK_BYTES, 0)

    @property
    def path(self) -> str:
        """Where the other ranks open it while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"


@dataclass(frozen=True)
class SharedGroup(Group):
    """A tensor-parallel group in shared memory; tensors of a GPU are staged through the host."""

    memory: SharedMemory = field(kw_only=True)
    library: Library = field(kw_only=True)

    @property
    def capturable(self) -> bool:
        return False

    def all_reduce(self, x: Tensor) -> Tensor:
        kind = x.dtype if x.dtype in self.library.group_reduce else torch.float32
        y = x.to("cpu", kind).contiguous()
        self.library.group_reduce[kind](ctypes.byref(self.memory.state), y.data_ptr(), y.numel())
        return y.to(x.device, x.dtype)

    def gather(self, x: Tensor) -> Tensor:
        y = x.cpu().contiguous()
        rows, width = y.numel() // y.shape[-1], y.shape[-1]
        shape = (*y.shape[:-1], self.size * width)
        out = y.new_empty(shape if self.rank == 0 else 0)
        self.library.group_gather(
            ctypes.byref(self.memory.state), y.data_ptr(), rows, width * y.itemsize, out.data_ptr()
        )
        return out.to(x.device) if self.rank == 0 else x

    def broadcast(self, x: Tensor) -> Tensor:
        y = x.cpu().contiguous()
        self.library.group_broadcast(
            ctypes.byref(self.memory.state), y.data_ptr(), y.numel() * y.itemsize
        )
        return y.to(x.device)


class RingPipeline(Pipeline):
    """Hidden states from stage to stage through rings."""

    def __init__(
        self, before: RingReceiver | None, after: RingSender | None, device: torch.device
    ) -> None:
        self._before = before
        self._after = after
        self._device = device

    def send(self, hidden: Tensor) -> None:
        assert self._after is not None
        bits = hidden.cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
        self._after.send(bits.data)

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        assert self._before is not None
        data = self._before.receive()
        assert data is not None
        return torch.frombuffer(data, dtype=dtype).view(shape).to(self._device)
