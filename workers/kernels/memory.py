"""Memory on huge pages, where the system has them.

What is read once a step from end to end, or in jumps over gigabytes, otherwise spends its time in
page-table walks.
"""

import mmap
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def huge_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor whose memory is taken as it is first written."""
    size = max(1, prod(shape)) * dtype.itemsize
    if size < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)[: prod(shape)].view(shape)
