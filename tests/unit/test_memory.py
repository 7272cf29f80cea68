"""Memory for weights and results: where it lies, and that nobody gets what another still has."""

import ctypes
import gc
import mmap
import re
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.waiting import until
from workers.kernels.memory import HUGE_PAGE, Prefault, huge_tensor, result_tensor


def mapping(tensor: Tensor) -> tuple[str, set[str]]:
    """(permissions, VmFlags) of the mapping that holds a tensor's first byte."""
    at, inside, permissions = tensor.data_ptr(), False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            inside = int(found[1], 16) <= at < int(found[2], 16)
            permissions = found[3]
        elif inside and line.startswith("VmFlags:"):
            return permissions, set(line.split()[1:])
    raise AssertionError("no mapping holds it")


@pytest.mark.parametrize("megabytes", [1, 3, 100])
def test_huge_pages_are_asked_for_and_memory_is_private(megabytes: int) -> None:
    tensor = huge_tensor((megabytes, 1 << 20), torch.uint8)
    permissions, flags = mapping(tensor)
    assert "hg" in flags
    assert permissions == "rw-p"  # shared memory gets none where shmem_enabled is never


def test_a_large_tensor_begins_with_a_huge_page() -> None:
    assert huge_tensor((64, 1 << 20), torch.uint8).data_ptr() % HUGE_PAGE == 0


def test_small_tensors_share_huge_pages_and_nothing_else() -> None:
    tensors = [huge_tensor((n, 1000), torch.bfloat16) for n in range(1, 200)]
    for n, tensor in enumerate(tensors):
        tensor.fill_(n)
        assert tensor.data_ptr() % 64 == 0
    assert all((tensor == n).all() for n, tensor in enumerate(tensors))


def test_an_empty_tensor() -> None:
    assert huge_tensor((0, 3), torch.float32).shape == (0, 3)
    assert result_tensor((0, 3), torch.float32).shape == (0, 3)


def test_results_are_reused_only_when_every_view_is_gone() -> None:
    shape = (1000, 3000)
    first = result_tensor(shape, torch.bfloat16)
    at, view = first.data_ptr(), first[3:].view(-1)
    del first
    gc.collect()
    second = result_tensor(shape, torch.bfloat16)
    assert second.data_ptr() != at
    view.fill_(1)
    second.fill_(2)
    assert (view == 1).all()
    del view
    assert result_tensor((999, 3001), torch.bfloat16).data_ptr() == at


def test_results_are_right_whatever_was_there() -> None:
    for rows in (700, 900, 800):
        result = result_tensor((rows, 1024), torch.float32)
        result.copy_(torch.arange(rows)[:, None].expand(-1, 1024))
        assert (result[:, 7] == torch.arange(rows)).all()


def resident(tensor: Tensor) -> int:
    """Bytes of the tensor's pages that have memory."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_prefault_takes_all_memory_and_keeps_contents() -> None:
    tensors = [huge_tensor((size, 1 << 20), torch.uint8) for size in (70, 41)]
    for tensor in tensors:
        tensor[3:5] = 7
        assert resident(tensor) < 10 << 20
    Prefault(tensors)
    until(lambda: all(resident(x) >= x.nbytes for x in tensors))
    assert all(int(tensor.sum(dtype=torch.int64)) == 7 * 2 << 20 for tensor in tensors)


def test_prefault_waits_while_paused_and_ends_with_its_tensors() -> None:
    tensors = [huge_tensor((1 << 30,), torch.uint8) for _ in range(2)]
    prefault = Prefault(tensors)
    prefault.pause(60)
    time.sleep(0.1)  # the piece in progress
    before = resident(tensors[0])
    time.sleep(0.3)
    assert resident(tensors[0]) == before < 1 << 30
    tensors.pop()
    prefault.pause(0)
    until(lambda: not prefault._thread.is_alive())
    assert resident(tensors[0]) < 1 << 30
