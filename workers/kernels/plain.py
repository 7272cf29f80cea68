"""The kernels in plain PyTorch: for CUDA, for other dtypes, and where nothing can be compiled."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rope(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As ``kernels.rope``: in place."""
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    for x in (q, k):
        a, b = x[..., :half].float(), x[..., half : 2 * half].float()
        rotated = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
        x[..., : 2 * half] = rotated.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``kernels.rms_norm``."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``kernels.add_rms_norm``: ``residual`` in place."""
    residual += x
    return rms_norm(residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``kernels.layer_norm``."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def silu_mul(x: Tensor) -> Tensor:
    """As ``kernels.silu_mul``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def argmax_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kernels.argmax_lse``."""
    lse = logits.float().logsumexp(-1)
    return logits.argmax(-1), lse, lse.isfinite()
