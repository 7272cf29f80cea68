"""Products of few rows with a weight, bound by reading the weight.

cuBLASLt's own kernels for this take as long, but leave the memory idle at their start and end, and
cannot be given an epilogue. Each sum is over K in order, in steps of the matrix units, in float32:
so it has the same bits as cuBLASLt's without split-K (measured for all tiles tried, on an H200),
whatever the tiles, and steps of any size may take whichever is faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import chained, let_next_start, wait_for_previous
from workers.kernels.gpu.elementwise import gated

MOST_ROWS = 32
BLOCK_N = 64  # outputs of a program
STAGES = 6
PREFETCHED = 32 << 10  # bytes of a program's weight that are on their way before its turn
_LINE = tl.constexpr(64)  # elements of 16 bits in a line of the cache


@triton.jit
def _product(
    x, x_stride, w, bias, y, rows, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    AHEAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """BN outputs of all rows each: y [rows, N] = x [rows, K] · w [N, K] transposed, + bias.

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
    acc = tl.zeros([BN, BM], tl.float32)  # the matrix units take 64 rows of the first operand
    for i in range(0, K, BK):
        inside = (i + k < K)[None, :]
        a = tl.load(line + i + k[None, :], mask=there[:, None] & inside, other=0.0)
        b = tl.load(
            x + m[:, None] * x_stride + i + k[None, :], mask=(m < rows)[:, None] & inside, other=0.0
        )
        acc = tl.dot(a, tl.trans(b), acc)
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


def serves(x: Tensor) -> bool:
    """Whether ``product`` is for x [rows, K]: few rows, of 16 bits."""
    return len(x) <= MOST_ROWS and x.dtype.itemsize == 2


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """x [rows, K] · weight [N, K] transposed + bias [N], in x's type; ``gated``: the weight's
    halves are gate and up, and the result is silu(gate) · up [rows, N / 2]."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    block_m = 16 if rows <= 16 else 32
    per_program = BLOCK_N // 2 if gated else BLOCK_N
    ahead = min(PREFETCHED // (BLOCK_N * 128), inputs // 64)
    options = chained(x.device)
    _product[(triton.cdiv(outputs, per_program), triton.cdiv(rows, block_m))](
        x, x.stride(0), weight, bias, y, rows, outputs, inputs, BM=block_m, BN=BLOCK_N, BK=128,
        GATED=gated, BIAS=bias is not None,
        AHEAD=1 << (ahead.bit_length() - 1) if ahead and options["CHAINED"] else 0,
        num_warps=4, num_stages=STAGES, **options,
    )  # fmt: skip
    return y
