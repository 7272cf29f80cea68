"""Products with a weight that stays in codes (workers/quantization/codes.py).

A code becomes the number that the weight has in the type of x, as it would while it is loaded; from
there on it is the product of few rows (product.py): each sum over K in order, in float32. Many rows
are worth making the whole weight of the codes first, for cuBLASLt's product.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu import fp8_product
from workers.kernels.gpu.chain import chained, let_next_start, wait_for_previous
from workers.kernels.gpu.e4m3 import from_e4m3
from workers.kernels.gpu.product import serves
from workers.quantization.codes import HALF, Coded, Kind

HALF_BLOCK = tl.constexpr(HALF)
_E4M3, _E2M1 = tl.constexpr(Kind.E4M3.value), tl.constexpr(Kind.E2M1.value)
ROWS, OUTPUTS = 64, 64  # that a program makes of codes, at a time


@triton.jit
def _numbers(codes, KIND: tl.constexpr):
    """What the codes are as numbers, float32: floats of 4 bits have the bits of narrower exponents
    in float16's places, and so are 2^14 times as large."""
    if KIND == _E4M3:
        return from_e4m3(codes).to(tl.float32) * 256.0
    elif KIND == _E2M1:
        bits = codes.to(tl.uint16)
        bits = ((bits & 0x8) << 12) | ((bits & 0x7) << 9)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    else:
        return codes.to(tl.float32)


@triton.jit
def _values(
    codes, n, there, k, K, scales, zeros, groups, num_groups, group_size, offset,
    KIND: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """The weight [BN, 64] of codes at outputs n and columns k, float32."""
    inside = k < K
    if BY_COLUMN:
        group = tl.load(groups + k, mask=inside, other=0)[None, :]
        mask = there[:, None] & inside[None, :]
    else:
        group = tl.minimum((tl.min(k, 0) + offset) // group_size, num_groups - 1)
        mask = there[:, None]
    at = n.to(tl.int64)[:, None] * num_groups + group
    values = _numbers(codes, KIND)
    if ZEROS:
        values -= tl.load(zeros + at, mask=mask, other=0).to(tl.float32)
    else:
        values -= MIDDLE
    return values * tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def two_halves(
    codes, n, there, start, K, scales, zeros, groups, num_groups, group_size, offset,
    KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """The weight at columns [start, start + 64) and at the next 64, each [BN, 64] float32."""
    k = start + tl.arange(0, HALF_BLOCK)
    if BITS == 4:
        width = tl.cdiv(K, 2 * HALF_BLOCK) * HALF_BLOCK
        at = n.to(tl.int64)[:, None] * width + start // 2 + tl.arange(0, HALF_BLOCK)[None, :]
        both = tl.load(codes + at, mask=there[:, None], other=0)
        low = both & 15
        high = both >> 4
    else:
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        low = tl.load(codes + at, mask=there[:, None] & (k < K)[None, :], other=0)
        far = there[:, None] & (k + HALF_BLOCK < K)[None, :]
        high = tl.load(codes + at + HALF_BLOCK, mask=far, other=0)
    first = _values(
        low, n, there, k, K, scales, zeros, groups, num_groups, group_size, offset,
        KIND, MIDDLE, ZEROS, BY_COLUMN,
    )  # fmt: skip
    second = _values(
        high, n, there, k + HALF_BLOCK, K, scales, zeros, groups, num_groups, group_size, offset,
        KIND, MIDDLE, ZEROS, BY_COLUMN,
    )  # fmt: skip
    return first, second


@triton.jit
def _product(
    x, x_stride, y, rows, N, K, codes, scales, zeros, groups, num_groups, group_size, offset,
    BM: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    MIDDLE: tl.constexpr, ZEROS: tl.constexpr, BY_COLUMN: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """BN outputs of BM rows each: y [rows, N] = x [rows, K] · the weight [N, K] transposed."""
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    there = n < N
    asked = m < rows
    k = tl.arange(0, HALF_BLOCK)
    line = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    dtype = y.dtype.element_ty
    acc = tl.zeros([BN, BM], tl.float32)
    for i in range(0, K, 2 * HALF_BLOCK):
        first, second = two_halves(
            codes, n, there, i, K, scales, zeros, groups, num_groups, group_size, offset,
            KIND, BITS, MIDDLE, ZEROS, BY_COLUMN,
        )  # fmt: skip
        a = tl.load(line + i, mask=asked[:, None] & (k + i < K)[None, :], other=0.0)
        far = asked[:, None] & (k + i + HALF_BLOCK < K)[None, :]
        b = tl.load(line + HALF_BLOCK + i, mask=far, other=0.0)
        acc = tl.dot(first.to(dtype), tl.trans(a), acc)
        acc = tl.dot(second.to(dtype), tl.trans(b), acc)
    to = y + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(to, acc.to(dtype), mask=there[:, None] & asked[None, :])


@triton.jit
def _decode(
    y, N, K, codes, scales, zeros, groups, num_groups, group_size, offset,
    BN: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, BY_COLUMN: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """128 columns of BN outputs each of the weight y [N, K]."""
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    there = n < N
    start = tl.program_id(1) * 2 * HALF_BLOCK
    first, second = two_halves(
        codes, n, there, start, K, scales, zeros, groups, num_groups, group_size, offset,
        KIND, BITS, MIDDLE, ZEROS, BY_COLUMN,
    )  # fmt: skip
    k = start + tl.arange(0, HALF_BLOCK)
    to = y + n.to(tl.int64)[:, None] * K + k[None, :]
    dtype = y.dtype.element_ty
    tl.store(to, first.to(dtype), mask=there[:, None] & (k < K)[None, :])
    far = there[:, None] & (k + HALF_BLOCK < K)[None, :]
    tl.store(to + HALF_BLOCK, second.to(dtype), mask=far)


def arguments(weight: Coded | None) -> dict[str, object]:
    """Those of a kernel that calls ``two_halves``, or not: of one without codes."""
    if weight is None:
        numbers = dict.fromkeys(("num_groups", "group_size", "offset", "BITS", "MIDDLE"), 0)
        nothing = dict.fromkeys(("codes", "scales", "zeros", "groups", "KIND"))
        return {**numbers, **nothing, "ZEROS": False, "BY_COLUMN": False}
    return {
        "codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros,
        "groups": weight.groups, "num_groups": weight.scales.shape[-1],
        "group_size": weight.group_size, "offset": weight.offset, "KIND": weight.kind.value,
        "BITS": weight.kind.bits, "MIDDLE": weight.kind.middle, "ZEROS": weight.zeros is not None,
        "BY_COLUMN": weight.groups is not None,
    }  # fmt: skip


def decoded(weight: Coded) -> Tensor:
    """The weight [N, K] in its type."""
    outputs, inputs = weight.shape
    y = torch.empty(outputs, inputs, dtype=weight.dtype, device=weight.device)
    _decode[(triton.cdiv(outputs, OUTPUTS), triton.cdiv(inputs, 2 * HALF))](
        y, outputs, inputs, **arguments(weight), BN=OUTPUTS, **chained(y.device)
    )
    return y


def product(x: Tensor, weight: Coded) -> Tensor:
    """x [rows, K] · the weight [N, K] transposed, in x's type, which is the weight's. Where the
    weight has a rounder, x is rounded."""
    if weight.rounder is not None:
        if fp8_product.serves(weight):
            return fp8_product.product(x, weight)
        x = weight.rounder.values(x)
    return few_rows(x, weight) if serves(x) else F.linear(x, decoded(weight))


def few_rows(x: Tensor, weight: Coded) -> Tensor:
    """The same by the kernel for few rows."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    most = 16 if rows <= 16 else 32 if rows <= 32 else ROWS
    _product[(triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, most))](
        x, x.stride(0), y, rows, outputs, inputs, **arguments(weight), BM=most, BN=OUTPUTS,
        num_warps=4, num_stages=3, **chained(x.device),
    )  # fmt: skip
    return y
