"""The choice of a token's experts. Bound by latency."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained


@triton.jit
def _first_of_most(values, at, END: tl.constexpr):
    """The greatest of ``values`` along the last axis, and the first place ``at`` that has it."""
    most = tl.max(values, -1, keep_dims=True)
    place = tl.min(tl.where(values == most, at, END), -1, keep_dims=True)
    return most, place


@triton.jit
def _within_groups(
    ranked, e, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, GP: tl.constexpr, KEPT: tl.constexpr,
    BEST: tl.constexpr,
):  # fmt: skip
    """``ranked`` with -inf outside of those KEPT of GROUPS groups whose BEST scores have the
    greatest sums."""
    g = tl.arange(0, GP)
    member = (e[None, :] // (EXPERTS // GROUPS) == g[:, None]) & (e[None, :] < EXPERTS)
    left = tl.where(member, ranked[None, :], -float("inf"))
    sums = tl.zeros([GP, 1], tl.float32)
    for _ in tl.static_range(BEST):
        most, place = _first_of_most(left, e[None, :], e.shape[0])
        sums += most
        left = tl.where(e[None, :] == place, -float("inf"), left)
    sums = tl.where(g < GROUPS, tl.reshape(sums, [GP]), -float("inf"))
    allowed = g < 0
    for _ in tl.static_range(KEPT):
        _, place = _first_of_most(sums, g, GP)
        allowed = allowed | (g == place)
        sums = tl.where(g == place, -float("inf"), sums)
    kept = tl.max((member & allowed[:, None]).to(tl.int32), 0) > 0
    return tl.where(kept, ranked, -float("inf"))


@triton.jit
def _route(
    logits, bias, correction, weights, chosen, scale,
    EXPERTS: tl.constexpr, EP: tl.constexpr, CHOSEN: tl.constexpr, CP: tl.constexpr,
    SCORES: tl.constexpr, NORMED: tl.constexpr, GROUPS: tl.constexpr, GP: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr, LEAST: tl.constexpr, BIAS: tl.constexpr,
    CORRECTION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A token's choice, the first one first; of equal scores the lower number. Grid (T,)."""
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EP)
    there = e < EXPERTS
    dtype = logits.dtype.element_ty
    x = tl.load(logits + row * EXPERTS + e, mask=there, other=-float("inf")).to(tl.float32)
    if BIAS:
        x += tl.load(bias + e, mask=there, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
    scores = x
    if SCORES == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-x))
    if SCORES == "softmax":
        scores = tl.exp(x - tl.max(x, 0))
        scores = scores / tl.sum(scores, 0)
    ranked = scores
    if CORRECTION:
        ranked += tl.load(correction + e, mask=there, other=0.0)
    ranked = tl.where(there, ranked, -float("inf"))
    if GROUPS > 1:
        ranked = _within_groups(ranked, e, EXPERTS, GROUPS, GP, KEPT, BEST)
    c = tl.arange(0, CP)
    numbers = tl.zeros([CP], tl.int32)
    found = tl.zeros([CP], tl.float32)
    for j in tl.static_range(CHOSEN):
        _, place = _first_of_most(ranked, e, EXPERTS - 1)  # a number even if all are NaN
        numbers = tl.where(c == j, place, numbers)
        found = tl.where(c == j, tl.sum(tl.where(e == place, scores, 0.0), 0), found)
        ranked = tl.where(e == place, -float("inf"), ranked)
    if SCORES == "chosen":
        found = tl.where(c < CHOSEN, found, -float("inf"))
        found = tl.exp(found - tl.max(found, 0))
        found = found / tl.sum(found, 0)
    if NORMED:
        found = found / (tl.sum(found, 0) + LEAST)
    tl.store(weights + row * CHOSEN + c, found * scale, mask=c < CHOSEN)
    tl.store(chosen + row * CHOSEN + c, numbers, mask=c < CHOSEN)


def route(
    logits: Tensor, bias: Tensor | None, correction: Tensor | None, *, chosen: int, scores: str,
    normed: bool, least_sum: float, scale: float, groups: int, chosen_groups: int, group_best: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights, float32, and numbers, int32, of the experts of each token, [T, chosen], by logits
    [T, experts] + bias. See ``Routing`` of workers/layers/routing.py."""
    rows, experts = logits.shape
    weights = torch.empty(rows, chosen, dtype=torch.float32, device=logits.device)
    numbers = torch.empty(rows, chosen, dtype=torch.int32, device=logits.device)
    _route[(rows,)](
        logits, bias, correction, weights, numbers, scale, EXPERTS=experts,
        EP=triton.next_power_of_2(experts), CHOSEN=chosen, CP=triton.next_power_of_2(chosen),
        SCORES=scores, NORMED=normed, GROUPS=groups, GP=triton.next_power_of_2(groups),
        KEPT=chosen_groups, BEST=group_best, LEAST=least_sum, BIAS=bias is not None,
        CORRECTION=correction is not None, num_warps=2, **chained(logits.device),
    )  # fmt: skip
    return weights, numbers
