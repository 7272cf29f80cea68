"""The kernels in plain PyTorch: for other devices and dtypes, and where nothing can be compiled."""

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


def layer_norm(x: Tensor, weight: Tensor, offset: Tensor, eps: float) -> Tensor:
    """As ``kernels.layer_norm``."""
    return F.layer_norm(x, x.shape[-1:], weight, offset, eps)


def silu_mul(x: Tensor) -> Tensor:
    """As ``kernels.silu_mul``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def bias_act(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """As ``kernels.bias_act``."""
    if bias is not None:
        x = x + bias
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x) if activation == "gelu" else x


def mask_rows(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """As ``kernels.mask_rows``: in place."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    banned = (masks[..., None] >> bits & 1).view(len(masks), -1)[:, : logits.shape[1]] == 0
    at = rows.long()
    logits[at] = torch.where(banned, logits[at] - torch.inf, logits[at])


def argmax_lse(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kernels.argmax_lse``."""
    lse = logits.float().logsumexp(-1)
    return logits.argmax(-1), lse, lse.isfinite()


def look_up(
    tokens: Tensor, tables: Tensor, slots: Tensor, positions: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """As ``kernels.look_up``."""
    blocks = tables[slots, positions // block_size].long()
    return tokens[slots, positions].long(), blocks * block_size + positions % block_size
