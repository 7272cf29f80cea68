"""Memory on huge pages, where the system has them: weights, KV blocks, what layers compute.

What is read once a step from end to end, or in jumps over gigabytes, otherwise spends its time in
page-table walks: measured, one core reads 34 instead of 22 GB/s.
"""

import contextlib
import ctypes
import mmap
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HUGE_PAGE = 2 << 20
_CHUNK = 16 * HUGE_PAGE  # shared by what is smaller: a weight of 1 MB alone would fill no huge page
_LINE = 64  # bytes
_POPULATE = 23  # MADV_POPULATE_WRITE
_libc = ctypes.CDLL(None)  # mmap.madvise would hold the interpreter's lock
_lock = threading.Lock()
_rest = torch.empty(0, dtype=torch.uint8)  # of the last chunk

_SMALL = 1 << 20  # results below are left to malloc, which keeps what it is given back
_LARGE = 128 << 20  # those above (the logits of a whole prompt) had better go back to the system
_free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)  # for results, by size


def huge_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor whose memory is taken as it is first written."""
    global _rest
    size = max(1, prod(shape)) * dtype.itemsize
    if size >= _CHUNK:
        memory = _map(size)
    else:
        with _lock:
            if size > len(_rest):
                _rest = _map(_CHUNK)
            memory, _rest = _rest[:size], _rest[size + -size % _LINE :]
    return memory.view(dtype)[: prod(shape)].view(shape)


def mapped_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, of memory that the system has back as soon as it is gone: malloc
    keeps some of what it is given back."""
    if prod(shape) * dtype.itemsize < _SMALL:
        return torch.empty(shape, dtype=dtype)
    return _map(prod(shape) * dtype.itemsize).view(dtype).view(shape)


def trim() -> None:
    """Give the system what malloc keeps of memory that is free."""
    with contextlib.suppress(AttributeError):  # another libc than glibc
        _libc.malloc_trim(ctypes.c_size_t(0))


def weight_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor for a weight, which may be let go when it is packed."""
    if device.type == "cpu":
        return mapped_tensor(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _map(size: int) -> Tensor:
    """``size`` bytes from the beginning of a huge page on."""
    # Private: shared memory has huge pages only where shmem_enabled says so.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]


class Prefault:
    """Has the system back tensors with memory before they are written, in a thread of its own.

    Their contents stay. It goes through all of them side by side, as KV blocks are used, does
    nothing while paused, and ends early when one of the tensors is gone. Where the system cannot
    do it (before Linux 5.14), their memory is taken as it is written.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._paused_until = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        if sys.platform == "linux":
            self._thread.start()

    def pause(self, seconds: float) -> None:
        """Leave cores and memory to others for so long from now on."""
        self._paused_until = time.monotonic() + seconds

    def _run(self) -> None:
        offset, more = 0, True
        while more:
            more = False
            for weak in self._tensors:
                while (seconds := self._paused_until - time.monotonic()) > 0:
                    time.sleep(min(seconds, 0.05))
                tensor = weak()
                if tensor is None:
                    return
                first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE + offset
                length = min(HUGE_PAGE, tensor.data_ptr() + tensor.nbytes - first)
                if length > 0:
                    more = True
                    if _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _POPULATE):
                        return
                del tensor
            offset += HUGE_PAGE


class _Lease(np.ndarray[Any, Any]):
    """Memory of the pool, until the tensor over it is gone."""

    def __del__(self) -> None:
        if type(self.base) is np.ndarray:  # and no lease: this is no slice of one
            _free[len(self.base)].append(self.base)


def result_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor for what a layer computes.

    A large one is memory of an earlier one that is gone: malloc gives such memory back to the
    system, and a step would take it page by page again (measured: 60,000 page faults a prefill).
    """
    size = prod(shape) * dtype.itemsize
    if not _SMALL <= size <= _LARGE:
        return torch.empty(shape, dtype=dtype)
    capacity = 1 << (size - 1).bit_length()
    try:
        memory = _free[capacity].pop()
    except IndexError:
        memory = _map(capacity).numpy()
    lease = memory.view(_Lease)
    return torch.frombuffer(lease, dtype=dtype, count=prod(shape)).view(shape)
