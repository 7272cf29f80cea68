"""8-bit floats (E4M3) to numbers and back, in integer arithmetic: the same on every GPU, as those
before compute capability 8.9 have no instructions for it, and in Triton's interpreter, which rounds
to 8 bits in another way."""

import triton
import triton.language as tl

# By how much E4M3's exponents are below float32's: 1.0 has 7 there, and 127 here.
_LOWER = tl.constexpr((127 - 7) << 23)
_SMALLEST = tl.constexpr(2.0**-6)  # that is normal
_STEPS = tl.constexpr(2.0**14)  # whose last bit in float32 is worth 2^-9, E4M3's smallest step


@triton.jit
def from_e4m3(codes):
    """E4M3 codes as float16, 2^8 times too small: its exponents have the same places, but are meant
    as much lower. Exact, for numbers that are not normal in either too."""
    bits = codes.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def to_e4m3(x):
    """The codes uint8 of float32 numbers of at most 448, or NaN: the nearest, of two the even
    one."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size - _LOWER + 0x7FFFF + ((size >> 20) & 1)) >> 20
    steps = (tl.abs(x) + _STEPS).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(tl.abs(x) < _SMALLEST, steps, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
