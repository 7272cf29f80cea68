"""Everything a layer computes beside matrix products and attention.

Each function takes tensors of any device and dtype. CPU tensors of bf16 or fp32 go to compiled
kernels (cpu.cpp), all others to the same in PyTorch (plain.py). Maths is in fp32 inside, and
rounding follows transformers. The last dimension is contiguous; tokens may be strided, so that
slices of a fused projection need no copy.
"""

from typing import Any

import torch
from torch import Tensor

from workers.kernels import plain
from workers.kernels.build import library
from workers.kernels.memory import result_tensor

__all__ = ["add_rms_norm", "argmax_lse", "layer_norm", "rms_norm", "rope", "silu_mul"]


def _compiled(name: str, x: Tensor) -> Any:
    if not x.is_cpu:
        return None
    lib = library()
    return lib and lib.functions.get((name, x.dtype))


def rope(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates q [T, heads, D] and k [T, kv_heads, D] in place, NeoX style (RoFormer, Su 2021).

    positions is [T] int64; cos and sin are [max_positions, R / 2] fp32 and rotate the first R
    elements of each head, element i with element i + R / 2.
    """
    kernel = _compiled("rope", q)
    if kernel is None:
        return plain.rope(q, k, positions, cos, sin)
    tokens, heads, dim = q.shape
    assert q.stride(1) == k.stride(1) == dim and q.stride(2) == k.stride(2) == 1
    assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == torch.float32
    kernel(
        q.data_ptr(), q.stride(0), heads, k.data_ptr(), k.stride(0), k.shape[1], dim, tokens,
        positions.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [T, N] or [T, heads, N]."""
    kernel = _compiled("rms_norm", x)
    if kernel is None:
        return plain.rms_norm(x, weight, eps)
    width = x.shape[-1]
    inner = x.shape[1] if x.dim() == 3 else 1
    assert x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == width)
    y = result_tensor(x.shape, x.dtype)
    kernel(
        x.data_ptr(), x.stride(0), x.shape[0], inner, width, weight.data_ptr(), eps, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x [T, N] to ``residual`` [T, N] in place and returns the rms_norm of the sum."""
    kernel = _compiled("add_rms_norm", x)
    if kernel is None:
        return plain.add_rms_norm(x, residual, weight, eps)
    rows, width = x.shape
    assert x.stride(1) == 1 and residual.is_contiguous()
    y = result_tensor(x.shape, x.dtype)
    kernel(
        x.data_ptr(), x.stride(0), residual.data_ptr(), rows, width, weight.data_ptr(), eps,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension of x [T, N]."""
    kernel = _compiled("layer_norm", x)
    if kernel is None:
        return plain.layer_norm(x, weight, bias, eps)
    rows, width = x.shape
    assert x.stride(1) == 1
    y = result_tensor(x.shape, x.dtype)
    kernel(
        x.data_ptr(), x.stride(0), rows, width, weight.data_ptr(), bias.data_ptr(), eps,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up [T, I] of x = [gate, up] [T, 2 I]."""
    kernel = _compiled("silu_mul", x)
    if kernel is None:
        return plain.silu_mul(x)
    rows, width = x.shape[0], x.shape[1] // 2
    assert x.stride(1) == 1
    y = result_tensor((rows, width), x.dtype)
    kernel(x.data_ptr(), x.stride(0), rows, width, y.data_ptr(), torch.get_num_threads())
    return y


def argmax_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [n, V]: the first index of the maximum [n] int64, log(sum(exp)) [n]
    fp32, and whether that is finite [n] bool.

    It is not where a logit is NaN or +inf (the index then means nothing) or all are -inf; single
    logits of -inf are allowed.
    """
    kernel = _compiled("argmax_lse", logits)
    if kernel is None:
        return plain.argmax_lse(logits)
    rows, width = logits.shape
    assert logits.stride(1) == 1
    index = torch.empty(rows, dtype=torch.int64)
    lse = torch.empty(rows, dtype=torch.float32)
    finite = torch.empty(rows, dtype=torch.bool)
    kernel(
        logits.data_ptr(), rows, logits.stride(0), width, index.data_ptr(), lse.data_ptr(),
        finite.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return index, lse, finite
