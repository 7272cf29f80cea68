"""The sum over GPUs of one host that reach each other's memory: one shot, bound by latency.

Each rank puts its part into memory that the others can read, tells them, waits for theirs, and adds
all parts itself, in float32 and in the order of ranks, so that every rank has the same bits and an
element's do not depend on what else is summed. Programs with the same number on all ranks work
together and need no others. Memory is used in turns by even and odd sums: whoever is at the next
sum has read the one before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained

BLOCK = 2048  # elements of a program
MOST_PROGRAMS = 4096
MOST_ELEMENTS = BLOCK * MOST_PROGRAMS  # of one launch


@triton.jit
def _all_reduce(
    x, y, parts, signals, turns, count, SIZE, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """parts, signals: [RANKS] int64, the addresses of every rank's two halves of SIZE elements and
    of its [RANKS, PROGRAMS] int32, where the others say how far they are. turns [PROGRAMS] int32
    counts this rank's sums."""
    begin(CHAINED)
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    turn = tl.load(turns + program) + 1
    half = (turn & 1).to(tl.int64) * SIZE
    dtype = x.dtype.element_ty
    mine = tl.load(x + at, mask=mask, other=0.0)
    own = tl.load(parts + RANK).to(tl.pointer_type(dtype))
    tl.store(own + half + at, mine, mask=mask)
    tl.debug_barrier()  # all of it is written before the others are told
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = tl.load(signals + rank).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + RANK * PROGRAMS + program, turn, sem="release", scope="sys")
    ours = tl.load(signals + RANK).to(tl.pointer_type(tl.int32))
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            signal = ours + rank * PROGRAMS + program
            while tl.atomic_add(signal, 0, sem="acquire", scope="sys") - turn < 0:
                pass
    tl.debug_barrier()
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += mine.to(tl.float32)
        else:
            part = tl.load(parts + rank).to(tl.pointer_type(dtype))
            total += tl.load(
                part + half + at, mask=mask, other=0.0, cache_modifier=".cv"
            ).to(tl.float32)  # fmt: skip
    tl.store(y + at, total.to(dtype), mask=mask)
    tl.store(turns + program, turn)


class Peers:
    """What ``all_reduce`` needs of every rank: addresses of memory of ``bytes_needed`` each."""

    def __init__(self, rank: int, memories: list[Tensor]) -> None:
        device = memories[rank].device
        self.rank, self.ranks, self.memories = rank, len(memories), memories
        starts = [memory.data_ptr() for memory in memories]
        self._parts = torch.tensor(starts, dtype=torch.int64, device=device)
        behind = 2 * MOST_ELEMENTS * 4
        signals = [start + behind for start in starts]
        self._signals = torch.tensor(signals, dtype=torch.int64, device=device)
        self._turns = torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device=device)

    @staticmethod
    def bytes_needed(ranks: int) -> int:
        return 2 * MOST_ELEMENTS * 4 + ranks * MOST_PROGRAMS * 4

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, which all must call alike."""
        x = x.contiguous()
        y = torch.empty_like(x)
        flat_x, flat_y = x.view(-1), y.view(-1)
        for at in range(0, x.numel(), MOST_ELEMENTS):
            count = min(MOST_ELEMENTS, x.numel() - at)
            _all_reduce[(triton.cdiv(count, BLOCK),)](
                flat_x[at:], flat_y[at:], self._parts, self._signals, self._turns, count,
                MOST_ELEMENTS, RANK=self.rank, RANKS=self.ranks, BLOCK=BLOCK,
                PROGRAMS=MOST_PROGRAMS, num_warps=8, **chained(x.device),
            )  # fmt: skip
        return y
