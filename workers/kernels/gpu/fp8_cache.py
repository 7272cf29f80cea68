"""Keys and values as 8-bit floats and their scales, by the rule of workers/kernels/fp8_cache.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.fp8_cache import BIAS, BROKEN, HEADROOM
from workers.kernels.gpu.e4m3 import to_e4m3

_BIAS, _BROKEN, _HEADROOM = tl.constexpr(BIAS), tl.constexpr(BROKEN), tl.constexpr(HEADROOM)


def is_fp8(cache: Tensor) -> int:
    """1 where a cache is of 8-bit floats, which is also how many bytes a vector's scale takes."""
    return int(cache.dtype == torch.uint8)


@triton.jit
def scales(exponents):
    """What numbers of ``from_e4m3`` are to be multiplied by, float32; 0 for the byte 0."""
    return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True) * 256.0


@triton.jit
def encoded(x):
    """Vectors x [N, D], of which elements beyond a vector's end are 0, as codes [N, D] uint8 and
    the exponents [N] uint8 of their scales."""
    x = x.to(tl.float32)
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) >> 23
    exponent = tl.where(largest < _BROKEN, tl.maximum(largest - _HEADROOM, 1), _BROKEN)
    inverse = (2 * _BIAS - tl.minimum(exponent, 2 * _BIAS - 1)) << 23
    codes = to_e4m3(x * inverse.to(tl.float32, bitcast=True)[:, None])
    return codes, exponent.to(tl.uint8)
