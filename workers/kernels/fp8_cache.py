"""Keys and values as 8-bit floats: E4M3 codes with a scale for each token and head.

A vector [D] becomes D codes and one byte b, whose scale 2^(b - 127) brings the largest element to
128 up to 256: value = code · scale. Codes and scales are the elements of OCP's MX formats (E4M3,
E8M0; Microscaling Formats v1.0), here with one scale for a whole vector.

Why not one scale for each layer, as checkpoints have them and vLLM reads them: a float's relative
error is the same at any scale, as long as it is within the 17 powers of two that E4M3 has. On the
embedded model the two err alike, and so does a scale of 32 bits. But a vector's own scale needs no
calibration, clips nothing, and holds values that one scale of 1 would round to 0. It is computed of
the vector alone, so a token's cell depends on nothing else in its batch. And as it is a power of
two, a code times its scale is exact in bfloat16: every backend reads the same numbers.

A vector with an infinity or a NaN has b = 255, and is read as infinities and NaNs: what a broken
model computes must not look sound again.
"""

import torch
from torch import Tensor

SCALE_BYTES = 1  # of a vector, behind its codes
HEADROOM = 7  # the largest element is scaled to at least 2^7: below 256, and 448 is the limit
BIAS = 127  # of the exponent b, as of float32's
BROKEN = 255


def encode(x: Tensor) -> Tensor:
    """[..., D] of any floats to [..., D + 1] uint8: the codes, then b."""
    x = x.float()
    # The bits of positive floats are ordered as they are, with NaN above all.
    largest = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True) >> 23
    exponent = (largest - HEADROOM).clamp(min=1).where(largest < BROKEN, BROKEN)
    inverse = ((2 * BIAS - exponent.clamp(max=2 * BIAS - 1)) << 23).view(torch.float32)
    codes = (x * inverse).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat((codes, exponent.to(torch.uint8)), -1)


def decode(coded: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``encode`` made, [..., D + 1], to numbers [..., D]."""
    scale = (coded[..., -1:].int() << 23).view(torch.float32)
    codes = coded[..., :-1].view(torch.float8_e4m3fn)
    return (codes.float() * scale).to(dtype)
