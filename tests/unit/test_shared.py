"""Ranks that add, gather and broadcast through shared memory, as real processes."""

import multiprocessing

import pytest
import torch
from torch import Tensor

from workers.kernels.build import library
from workers.shared import CHUNK_BYTES, SharedGroup, SharedMemory

# Rows and widths: small, odd, and of several rounds, whole rows and parts of one.
SHAPES = [(1, 1), (3, 7), (32, 1024), (1100, 513), (2, CHUNK_BYTES // 2 + 3)]


def make(rank: int, shape: tuple[int, int], dtype: torch.dtype, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def be(rank: int, size: int, path: str, results) -> None:
    torch.set_num_threads(1)
    group = SharedGroup(size, rank, memory=SharedMemory(size, rank, path), library=library())
    results.put((rank, [found.float().numpy() for found in work(group)]))  # no bit is lost


def work(group: SharedGroup) -> list[Tensor]:
    found = []
    for number, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = make(group.rank, shape, dtype, number)
            found += [group.all_reduce(x.clone()), group.gather(x), group.broadcast(x.clone())]
    for number in range(300):  # small ones in a row: no rank may overtake another
        x = make(group.rank, (4, 4), torch.float32, number)
        found.append(group.all_reduce(x))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_to_the_bit_and_are_right(size: int) -> None:
    memory = SharedMemory(size, 0)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    others = [
        context.Process(target=be, args=(rank, size, memory.path, results))
        for rank in range(1, size)
    ]
    for other in others:
        other.start()
    everyone = {0: work(SharedGroup(size, 0, memory=memory, library=library()))}
    for _ in others:
        rank, found = results.get(timeout=60)
        everyone[rank] = [torch.from_numpy(array) for array in found]
    for other in others:
        other.join()
    at = 0
    for number, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            parts = [make(rank, shape, dtype, number) for rank in range(size)]
            total = sum(part.float() for part in parts).to(dtype)
            for rank in range(size):
                reduced, gathered, broadcast = everyone[rank][at : at + 3]
                whole = torch.cat(parts, 1) if rank == 0 else parts[rank]
                assert torch.equal(reduced.float(), total.float())
                assert torch.equal(gathered.float(), whole.float())
                assert torch.equal(broadcast.float(), parts[0].float())
            at += 3
    for number in range(300):
        total = sum(make(rank, (4, 4), torch.float32, number) for rank in range(size))
        assert all(torch.equal(everyone[rank][at + number], total) for rank in range(size))
