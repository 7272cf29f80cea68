"""Inputs of products, rounded to E4M3: workers/quantization/rounding.py says how. Bound by memory.

A program takes a token's groups of inputs, each of which is in it as a whole. Divisions are exactly
rounded, so that codes and scales are those of PyTorch in every bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained
from workers.kernels.gpu.e4m3 import to_e4m3
from workers.quantization.rounding import LARGEST, LEAST, Rounder

ELEMENTS = 1024  # of a program, where a group is not larger
_LARGEST, _LEAST = tl.constexpr(LARGEST), tl.constexpr(LEAST)


@triton.jit
def _round(
    x, x_stride, static, codes, scales, K, count, size, offset, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, POWERS: tl.constexpr, STATIC: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of a token each; SIZE is a power of two, at least ``size``."""
    begin(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    i = tl.arange(0, SIZE)
    at = group[:, None] * size + i[None, :] - offset
    there = (i < size)[None, :] & (at >= 0) & (at < K)
    value = tl.load(x + token * x_stride + at, mask=there, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.zeros([GROUPS], tl.float32) + tl.load(static)
    else:
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(value), 1), _LEAST), _LARGEST)
        if POWERS:
            bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
            scale = bits.to(tl.float32, bitcast=True)
        tl.store(scales + token * count + group, scale, mask=group < count)
    value = tl.clamp(
        tl.div_rn(value, scale[:, None] + tl.zeros_like(value)), -_LARGEST, _LARGEST,
        propagate_nan=tl.PropagateNan.ALL,
    )  # fmt: skip
    tl.store(codes + token * K + at, to_e4m3(value), mask=there)


def rounded(x: Tensor, rounder: Rounder) -> tuple[Tensor, Tensor]:
    """x [T, K] (rows may be strided) as codes [T, K] and scales [T, groups], float32; a static
    scale is [1, 1]."""
    (tokens, inputs), count = x.shape, rounder.groups(x.shape[1])
    assert x.stride(1) == 1
    size, offset = (inputs, 0) if count == 1 else (rounder.rounding.group or 0, rounder.offset)
    static = rounder.scale
    codes = torch.empty(tokens, inputs, dtype=torch.uint8, device=x.device)
    if static is None:
        scales = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(size)
        groups = max(1, min(ELEMENTS // block, triton.next_power_of_2(count)))
    else:
        # Any pieces.
        scales, block, groups = static.view(1, 1), ELEMENTS, 1
        size, count = ELEMENTS, triton.cdiv(inputs, ELEMENTS)
    _round[(tokens, triton.cdiv(count, groups))](
        x, x.stride(0), static, codes, scales, inputs, count, size, offset, GROUPS=groups,
        SIZE=block, POWERS=rounder.rounding.powers, STATIC=static is not None,
        num_warps=min(16, max(1, groups * block // 512)), **chained(x.device),
    )  # fmt: skip
    return codes.view(torch.float8_e4m3fn), scales
