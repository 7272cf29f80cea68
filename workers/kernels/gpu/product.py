"""Products of few rows with a weight, bound by reading the weight.

cuBLASLt's own kernels for this take as long, but leave the memory idle at their start and end, and
cannot be given an epilogue. Each sum is over K in order, in steps of the matrix units, in float32:
so it has the same bits as cuBLASLt's without split-K (measured for all tiles tried, on an H200),
whatever the tiles, and steps of any size may take whichever is faster.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import chained, let_next_start, wait_for_previous
from workers.kernels.gpu.elementwise import gated

MOST_ROWS = 64
BUSY_PROGRAMS = 96  # that read a large GPU's memory nearly as fast as it goes
BLOCK_K = 128
PREFETCHED = 32 << 10  # bytes of a program's weight that are on their way before its turn
_LINE = tl.constexpr(64)  # elements of 16 bits in a line of the cache


@triton.jit
def _product(
    x, x_stride, w, bias, y, rows, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    AHEAD: tl.constexpr, ROWS_FIRST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """BN outputs of all rows each: y [rows, N] = x [rows, K] · w [N, K] transposed, + bias.

    ROWS_FIRST: BM is at least 64, which the matrix units take of the first operand; else BN is.
    GATED: w is [2 · N, K], gate above up, and y is silu(gate) · up; a program takes BN / 2 of each.
    """
    let_next_start(CHAINED)
    at = tl.arange(0, BN)
    if GATED:
        n = tl.program_id(0) * (BN // 2) + at // 2
        there = n < N
        n = n + (at % 2) * N
    else:
        n = tl.program_id(0) * BN + at
        there = n < N
    line = w + n.to(tl.int64)[:, None] * K
    if AHEAD > 0:  # weights depend on nobody
        ahead = line + tl.arange(0, AHEAD)[None, :] * _LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ahead], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    wait_for_previous(CHAINED)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN] if ROWS_FIRST else [BN, BM], tl.float32)
    for i in range(0, K, BK):
        inside = (i + k < K)[None, :]
        a = tl.load(line + i + k[None, :], mask=there[:, None] & inside, other=0.0)
        b = tl.load(
            x + m[:, None] * x_stride + i + k[None, :], mask=(m < rows)[:, None] & inside, other=0.0
        )
        acc = tl.dot(b, tl.trans(a), acc) if ROWS_FIRST else tl.dot(a, tl.trans(b), acc)
    if ROWS_FIRST:
        acc = tl.trans(acc)
    dtype = y.dtype.element_ty
    value = acc.to(dtype).to(tl.float32)
    if BIAS:
        value += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
        value = value.to(dtype).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(value, (BN // 2, 2, BM)), (0, 2, 1)))
        value = gated(gate, up, dtype)
        n = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        there = n < N
    to = y + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(to, value.to(dtype), mask=there[:, None] & (m < rows)[None, :])


class Tile(NamedTuple):
    """Of a program: its rows and outputs, and how it goes through K."""

    rows: int
    outputs: int
    stages: int
    warps: int

    def stages_on(self, shared: int) -> int:
        """``stages``, or as many as there are so many bytes of shared memory for."""
        stage = (self.rows + self.outputs) * BLOCK_K * 2
        return max(2, min(self.stages, shared // stage))


# The fastest of some twelve kinds tried for each number of rows (benchmarks/README.md).
_FEW = (Tile(16, 64, 6, 4), Tile(32, 64, 6, 4))
_MANY = (Tile(64, 128, 4, 8), Tile(64, 64, 6, 4), Tile(64, 32, 7, 4))


def _tile(rows: int, outputs: int) -> Tile:
    if rows <= 32:
        return _FEW[rows > 16]
    return next((t for t in _MANY if outputs >= BUSY_PROGRAMS * t.outputs), _MANY[-1])


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 1 << 30
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def serves(x: Tensor) -> bool:
    """Whether ``product`` is for x [rows, K]: few rows, of 16 bits."""
    return len(x) <= MOST_ROWS and x.dtype.itemsize == 2


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """x [rows, K] · weight [N, K] transposed + bias [N], in x's type; ``gated``: the weight's
    halves are gate and up, and the result is silu(gate) · up [rows, N / 2]."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    tile = _tile(rows, weight.shape[0])
    per_program = tile.outputs // 2 if gated else tile.outputs
    ahead = min(PREFETCHED // (tile.outputs * 128), inputs // 64)
    options = chained(x.device)
    _product[(triton.cdiv(outputs, per_program), triton.cdiv(rows, tile.rows))](
        x, x.stride(0), weight, bias, y, rows, outputs, inputs, BM=tile.rows, BN=tile.outputs,
        BK=BLOCK_K, GATED=gated, BIAS=bias is not None, ROWS_FIRST=tile.outputs < 64,
        AHEAD=1 << (ahead.bit_length() - 1) if ahead and options["CHAINED"] else 0,
        num_warps=tile.warps, num_stages=tile.stages_on(shared_memory(x.device)), **options,
    )  # fmt: skip
    return y
