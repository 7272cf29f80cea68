"""Memory on huge pages, where the system has them: weights, KV blocks, what layers compute.

What is read once a step from end to end, or in jumps over gigabytes, otherwise spends its time in
page-table walks: measured, one core reads 34 instead of 22 GB/s.
"""

import contextlib
import mmap
import threading
from collections import defaultdict
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HUGE_PAGE = 2 << 20
_CHUNK = 16 * HUGE_PAGE  # shared by what is smaller: a weight of 1 MB alone would fill no huge page
_LINE = 64  # bytes
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
