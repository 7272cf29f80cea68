"""From the fused projection to attention: biases, norms of q and k, rotation, keys and values into
their cells. One kernel, bound by memory: the projection is read once, q written once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained
from workers.kernels.gpu.fp8_cache import encoded, is_fp8


@triton.jit
def _place(
    qkv, qkv_stride, bias, q_norm, k_norm, eps, cos, sin, positions, cells, q, cache,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, H: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, FP8: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A token and H of its heads each: qkv [T, (HEADS + 2 · KV_HEADS) · D] to q [T, HEADS · D] and
    to the cells (block · BLOCK_SIZE + offset) of ``cache`` (see workers/kernels/gpu/attention.py).
    Rotation is NeoX's (RoFormer, arXiv 2104.09864) of the first 2 · HALF elements; cos and sin
    are [max_positions, HALF] fp32."""
    begin(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * H + tl.arange(0, H)
    d = tl.arange(0, DP)
    dtype = qkv.dtype.element_ty
    all_heads: tl.constexpr = HEADS + 2 * KV_HEADS
    is_value = heads >= HEADS + KV_HEADS
    is_query = heads < HEADS
    mask = (heads < all_heads)[:, None] & (d < D)[None, :]
    at = heads[:, None] * D + d[None, :]
    x = tl.load(qkv + token * qkv_stride + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
    plain = x
    scale = tl.full([H], 1.0, tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps)
        weight = tl.where(
            is_query[:, None],
            tl.load(q_norm + d, mask=d < D, other=0.0)[None, :],
            tl.load(k_norm + d, mask=d < D, other=0.0)[None, :],
        ).to(tl.float32)
        x = (x * scale[:, None]).to(dtype).to(tl.float32) * weight
        x = x.to(dtype).to(tl.float32)
    if ROTATE:
        position = tl.load(positions + token).to(tl.int64)
        pair = tl.where(d < HALF, d + HALF, d - HALF)
        turned = d < 2 * HALF
        other_at = heads[:, None] * D + pair[None, :]
        other_mask = (heads < all_heads)[:, None] & turned[None, :]
        other = tl.load(qkv + token * qkv_stride + other_at, mask=other_mask, other=0.0)
        other = other.to(tl.float32)
        if BIAS:
            other += tl.load(bias + other_at, mask=other_mask, other=0.0).to(tl.float32)
            other = other.to(dtype).to(tl.float32)
        if NORM:
            weight = tl.where(
                is_query[:, None],
                tl.load(q_norm + pair, mask=turned, other=0.0)[None, :],
                tl.load(k_norm + pair, mask=turned, other=0.0)[None, :],
            ).to(tl.float32)
            other = (other * scale[:, None]).to(dtype).to(tl.float32) * weight
            other = other.to(dtype).to(tl.float32)
        angle = position * HALF + d % HALF
        c = tl.load(cos + angle, mask=turned, other=1.0)[None, :]
        s = tl.load(sin + angle, mask=turned, other=0.0)[None, :]
        x = x * c + other * tl.where(d < HALF, -s, s)
    x = tl.where(is_value[:, None], plain, x).to(dtype)
    tl.store(q + token * (HEADS * D) + at, x, mask=mask & is_query[:, None])
    cell = tl.load(cells + token).to(tl.int64)
    which = tl.where(is_value, KV_HEADS, 0) + (heads - HEADS) % KV_HEADS
    kept = (heads >= HEADS) & (heads < all_heads)
    head = (cell // BLOCK_SIZE * (2 * KV_HEADS) + which) * (BLOCK_SIZE * (D + FP8))
    to = head[:, None] + cell % BLOCK_SIZE * D + d[None, :]
    if FP8:
        x, exponents = encoded(x)
        tl.store(cache + head + BLOCK_SIZE * D + cell % BLOCK_SIZE, exponents, mask=kept)
    tl.store(cache + to, x, mask=kept[:, None] & (d < D)[None, :])


def place(
    qkv: Tensor,
    cache: Tensor,
    cells: Tensor,
    positions: Tensor,
    heads: int,
    *,
    bias: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """q [T, heads · D], ready for attention; keys and values of qkv [T, (heads + 2 · kv_heads) · D]
    go to ``cells`` [T] of ``cache`` [num_blocks, 2, kv_heads, block_size, D], or D + 1 where it is
    of 8-bit floats. ``norms`` are the weights of q's and k's RMS norms, ``rotation`` the tables of
    cos and sin."""
    _, _, kv_heads, block_size, width = cache.shape
    fp8 = is_fp8(cache)
    dim = width - fp8
    q = torch.empty(len(qkv), heads * dim, dtype=qkv.dtype, device=qkv.device)
    per_program = 4
    grid = len(qkv), triton.cdiv(heads + 2 * kv_heads, per_program)
    q_norm, k_norm = norms or (None, None)
    cos, sin = rotation or (None, None)
    options: dict[str, Any] = {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": dim, "DP": triton.next_power_of_2(dim),
        "HALF": 1 if cos is None else cos.shape[1], "BLOCK_SIZE": block_size, "H": per_program,
        "BIAS": bias is not None, "NORM": norms is not None, "ROTATE": cos is not None,
        "FP8": fp8,
    }  # fmt: skip
    _place[grid](
        qkv, qkv.stride(0), bias, q_norm, k_norm, eps, cos, sin, positions, cells, q, cache,
        num_warps=1, **options, **chained(qkv.device),
    )  # fmt: skip
    return q
