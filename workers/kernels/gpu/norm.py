"""Norms over a hidden state, with the addition to the residual before them. Bound by memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained


@triton.jit
def _summed(x, update, update_bias, at, mask, ADD: tl.constexpr, BIAS: tl.constexpr):
    """A row of x after x += update + bias, in place, in float32; sums are of x as it is stored."""
    dtype = x.dtype.element_ty
    value = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        more = tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            more += tl.load(update_bias + at, mask=mask, other=0.0).to(tl.float32)
            more = more.to(dtype).to(tl.float32)
        value = (value.to(tl.float32) + more).to(dtype)
        tl.store(x + at, value, mask=mask)
    return value.to(tl.float32)


@triton.jit
def _rms(
    x, x_stride, update, update_bias, weight, out, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """A row each: x += update + bias, in place, then out = x / sqrt(mean(x²) + eps) · weight
    (arXiv 1910.07467). Sums are of x as it is stored; the product with the weight is of the
    rounded quotient, as in transformers."""
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < WIDTH
    dtype = x.dtype.element_ty
    wide = _summed(x + row * x_stride, update + row * WIDTH if ADD else update, update_bias, at,
                   mask, ADD, BIAS)  # fmt: skip
    mean = tl.sum(wide * wide, 0) / WIDTH
    scale = tl.load(weight + at, mask=mask, other=0.0)
    normed = (wide * (1.0 / tl.sqrt_rn(mean + eps))).to(dtype)
    tl.store(out + row * WIDTH + at, (normed.to(tl.float32) * scale).to(dtype), mask=mask)


@triton.jit
def _layer(
    x, x_stride, update, update_bias, weight, bias, out, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """As ``_rms`` with a layer norm: (x - mean) / sqrt(variance + eps) · weight + bias."""
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < WIDTH
    dtype = x.dtype.element_ty
    wide = _summed(x + row * x_stride, update + row * WIDTH if ADD else update, update_bias, at,
                   mask, ADD, BIAS)  # fmt: skip
    mean = tl.sum(wide, 0) / WIDTH
    centred = tl.where(mask, wide - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / WIDTH
    normed = centred * (1.0 / tl.sqrt_rn(variance + eps))
    scale = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    offset = tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, (normed * scale + offset).to(dtype), mask=mask)


@triton.jit
def _gated(
    x, z, z_stride, weight, out, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """A token and H of its heads each: x / sqrt(mean(x²) + eps) · weight · silu(z) of x [T, HEADS,
    WIDTH] in float32, rounded once."""
    begin(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H + tl.arange(0, H)
    d = tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None] & (d < WIDTH)[None, :]
    at = head[:, None] * WIDTH + d[None, :]
    value = tl.load(x + token * (HEADS * WIDTH) + at, mask=mask, other=0.0)
    gate = tl.load(z + token * z_stride + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + d, mask=d < WIDTH, other=0.0)
    normed = value * (1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / WIDTH + eps))[:, None]
    value = normed * scale[None, :] * (gate / (1.0 + tl.exp(-gate)))
    tl.store(out + token * (HEADS * WIDTH) + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _of_gated(
    x, z, z_stride, weight, out, eps, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A token's group each: v / sqrt(mean(v²) + eps) · weight of v = x · silu(z), x [T, GROUPS ·
    WIDTH] in float32, rounded once."""
    begin(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < WIDTH
    at = tl.program_id(1) * WIDTH + i
    value = tl.load(x + token * (GROUPS * WIDTH) + at, mask=mask, other=0.0)
    gate = tl.load(z + token * z_stride + at, mask=mask, other=0.0).to(tl.float32)
    value *= gate / (1.0 + tl.exp(-gate))
    normed = value * (1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / WIDTH + eps))
    value = normed * tl.load(weight + at, mask=mask, other=0.0)
    tl.store(out + token * (GROUPS * WIDTH) + at, value.to(out.dtype.element_ty), mask=mask)


def _shape(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """RMS norm of x [T, W] (rows may be strided), after ``x += update + bias`` if there is one."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms[(len(x),)](
        x, x.stride(0), update, bias, weight, out, eps, ADD=update is not None,
        BIAS=bias is not None, **_shape(x.shape[1]), **chained(x.device),
    )  # fmt: skip
    return out


def layer_norm(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    eps: float,
    update: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As ``rms_norm`` with a layer norm of ``weight`` and ``offset``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _layer[(len(x),)](
        x, x.stride(0), update, bias, weight, offset, out, eps, ADD=update is not None,
        BIAS=bias is not None, **_shape(x.shape[1]), **chained(x.device),
    )  # fmt: skip
    return out


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each head of x [T, heads, W], times silu(z) [T, heads * W] (rows may be strided);
    x and ``weight`` are float32, the result [T, heads * W] is of z's type."""
    tokens, heads, width = x.shape
    out = torch.empty(tokens, heads * width, dtype=z.dtype, device=x.device)
    per_program = 4
    _gated[(tokens, triton.cdiv(heads, per_program))](
        x, z, z.stride(0), weight, out, eps, HEADS=heads, WIDTH=width,
        BLOCK=triton.next_power_of_2(width), H=per_program, num_warps=1, **chained(x.device),
    )  # fmt: skip
    return out


def rms_norm_of_gated(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMS norm of each of the ``groups`` of x · silu(z), both [T, groups * W] (z's rows may be
    strided); x and ``weight`` [groups * W] are float32, the result is of z's type."""
    tokens, width = x.shape
    out = torch.empty(tokens, width, dtype=z.dtype, device=x.device)
    _of_gated[(tokens, groups)](
        x, z, z.stride(0), weight, out, eps, GROUPS=groups, **_shape(width // groups),
        **chained(x.device),
    )  # fmt: skip
    return out
