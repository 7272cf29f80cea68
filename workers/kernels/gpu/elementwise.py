"""Activations of the feed-forward, each with the bias before it. Bound by memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) · up in float32 of values of ``dtype``; silu is rounded to that before."""
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up


@triton.jit
def clamped(gate, up, alpha, limit):
    """(up + 1) · gate · sigmoid(alpha · gate) in float32, gate at most ``limit`` and up within it
    on either side (gpt-oss)."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); what 1 + exp(x) rounds off is put back, for it may be all of exp(x)."""
    power = tl.exp(tl.minimum(x, 20.0))
    more = 1.0 + power
    return tl.where(x > 20.0, x, tl.log(more) + (power - (more - 1.0)) / more)


@triton.jit
def _silu_mul(
    x, bias, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """silu(gate) · up of x = [gate, up] [T, 2 · WIDTH] to out [T, WIDTH]; silu is rounded before
    the product, as in transformers. Grid (T, pieces of a row)."""
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    dtype = x.dtype.element_ty
    gate = tl.load(x + row * (2 * WIDTH) + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * (2 * WIDTH) + WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        gate += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(bias + WIDTH + at, mask=mask, other=0.0).to(tl.float32)
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    tl.store(out + row * WIDTH + at, gated(gate, up, dtype).to(dtype), mask=mask)


@triton.jit
def _bias_act(
    x, bias, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """act(x + bias) in place, x [T, WIDTH]; ACT is "none", "relu" or "gelu" (the exact one).
    Grid (T, pieces of a row)."""
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    value = tl.load(x + row * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    if ACT == "relu":
        value = tl.maximum(value, 0.0)
    if ACT == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    tl.store(x + row * WIDTH + at, value.to(x.dtype.element_ty), mask=mask)


def silu_mul(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) · up [T, W] of x + bias = [gate, up] [T, 2 W], contiguous."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = rows, triton.cdiv(width, 1024)
    options = {"BLOCK": 1024, "BIAS": bias is not None, **chained(x.device)}
    _silu_mul[grid](x, bias, out, WIDTH=width, **options)
    return out


def bias_act(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation`` ("none", "relu", "gelu") of x + bias [T, W], contiguous, in place."""
    rows, width = x.shape
    grid = rows, triton.cdiv(width, 1024)
    options = {"BLOCK": 1024, "BIAS": bias is not None, **chained(x.device)}
    _bias_act[grid](x, bias, WIDTH=width, ACT=activation, **options)
    return x
