"""8-bit floats and their scales in Triton, by the rule of workers/attention/fp8.py.

In integer arithmetic, the same on every GPU: those before compute capability 8.9 have no
instructions for E4M3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.attention.fp8 import BIAS, BROKEN, HEADROOM

_BIAS, _BROKEN, _HEADROOM = tl.constexpr(BIAS), tl.constexpr(BROKEN), tl.constexpr(HEADROOM)
# By how much E4M3's exponents are below float32's: 1.0 has 7 there, and 127 here.
_LOWER = tl.constexpr((127 - 7) << 23)
_SMALLEST = tl.constexpr(2.0**-6)  # that is normal
_STEPS = tl.constexpr(2.0**14)  # whose last bit in float32 is worth 2^-9, E4M3's smallest step


def is_fp8(cache: Tensor) -> int:
    """1 where a cache is of 8-bit floats, which is also how many bytes a vector's scale takes."""
    return int(cache.dtype == torch.uint8)


@triton.jit
def e4m3(codes):
    """E4M3 codes as float16, 2^8 times too small: its exponents have the same places, but are meant
    as much lower. Exact, for numbers that are not normal in either too."""
    bits = codes.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def scales(exponents):
    """What numbers of ``e4m3`` are to be multiplied by, float32; 0 for the byte 0."""
    return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True) * 256.0


@triton.jit
def encoded(x):
    """Vectors x [N, D], of which elements beyond a vector's end are 0, as codes [N, D] uint8 and
    the exponents [N] uint8 of their scales."""
    x = x.to(tl.float32)
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) >> 23
    exponent = tl.where(largest < _BROKEN, tl.maximum(largest - _HEADROOM, 1), _BROKEN)
    inverse = (2 * _BIAS - tl.minimum(exponent, 2 * _BIAS - 1)) << 23
    x = x * inverse.to(tl.float32, bitcast=True)[:, None]
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Rounded to 3 bits behind the first, a tie to the even one; small ones to a multiple of a step.
    normal = (size - _LOWER + 0x7FFFF + ((size >> 20) & 1)) >> 20
    steps = (tl.abs(x) + _STEPS).to(tl.int32, bitcast=True) & 0xFF
    codes = tl.where(tl.abs(x) < _SMALLEST, steps, normal) | ((bits >> 24) & 0x80)
    return codes.to(tl.uint8), exponent.to(tl.uint8)
