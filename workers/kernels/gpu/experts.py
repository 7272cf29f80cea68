"""The products of a mixture of experts. Of few rows they are bound by reading the weights.

A pair is a token and one of its experts: pair ``i`` is choice ``i % chosen`` of token
``i // chosen``. Pairs are sorted by expert on the device, and a program takes a tile of one
expert's pairs; how many tiles there can be at most follows from the numbers of pairs and experts
alone, and those that are not there end at once. So nothing is looked at on the host.

A row's sums are over K in order, whatever its tile, and a token's experts are added in the order of
their choice. So no token depends on the others.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu import fp8_product
from workers.kernels.gpu.chain import begin, chained
from workers.kernels.gpu.coded import HALF_BLOCK, arguments, two_halves
from workers.kernels.gpu.elementwise import clamped, gated
from workers.kernels.gpu.fp8_product import sum_of_codes
from workers.kernels.gpu.product import BLOCK_K, Tile, shared_memory
from workers.quantization.codes import Coded


@triton.jit(do_not_specialize=["count", "first"])
def _sort(chosen, pairs, starts, count, first, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """Program e: the pairs of expert ``first`` + e, in order, behind those of the experts before
    it, from ``starts[e]`` to ``starts[e + 1]`` of ``pairs``. Grid (experts,)."""
    begin(CHAINED)
    expert = first + tl.program_id(0)
    at = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for i in range(0, count, BLOCK):
        c = tl.load(chosen + i + at, mask=i + at < count, other=-1)
        before += ((c >= first) & (c < expert)).to(tl.int32)
    start = tl.sum(before, 0)
    for i in range(0, count, BLOCK):
        mine = (tl.load(chosen + i + at, mask=i + at < count, other=-1) == expert).to(tl.int32)
        tl.store(pairs + start + tl.cumsum(mine, 0) - 1, i + at, mask=mine > 0)
        start += tl.sum(mine, 0)
    if tl.program_id(0) == 0:
        tl.store(starts, 0)
    tl.store(starts + tl.program_id(0) + 1, start)


@triton.jit
def _product(
    x, w, bias, y, pairs, starts, N, K, alpha, limit,
    CHOSEN: tl.constexpr, EXPERTS: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    BIAS: tl.constexpr, IEEE: tl.constexpr, CHAINED: tl.constexpr,
    codes, scales, zeros, groups, num_groups, group_size, offset, KIND: tl.constexpr,
    BITS: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, BY_COLUMN: tl.constexpr,
    w_scales, w_groups, w_size, w_offset, x_scales, x_stride, x_groups, x_size, x_offset,
    GROUPED: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """BN outputs of BM pairs of one expert: y [pairs, N] = x [pairs / CHOSEN, K] · w of [EXPERTS,
    N, K] transposed, + bias. Grid (pieces of N, most tiles).

    GATED: w is [EXPERTS, 2 · N, K], gate above up, and y is act(gate, up); a program takes BN / 2
    of each. With a KIND there are codes in place of w (see coded.py). ROUNDED: x and w are both
    E4M3 (see fp8_product.py).
    """
    begin(CHAINED)
    e = tl.arange(0, EP)
    begins = tl.load(starts + e, mask=e < EXPERTS, other=0)
    ends = tl.load(starts + e + 1, mask=e < EXPERTS, other=0)
    tiles = (ends - begins + BM - 1) // BM
    tile = tl.program_id(1)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if expert < EXPERTS:
        tile -= tl.sum(tl.where(e < expert, tiles, 0), 0)
        row = tl.load(starts + expert) + tile * BM + tl.arange(0, BM)
        held = row < tl.load(starts + expert + 1)
        pair = tl.load(pairs + row, mask=held, other=0).to(tl.int64)
        at = tl.arange(0, BN)
        if GATED:
            n = tl.program_id(0) * (BN // 2) + at // 2
            there = n < N
            n = n + (at % 2) * N
            outputs = 2 * N
        else:
            n = tl.program_id(0) * BN + at
            there = n < N
            outputs = N
        output = expert.to(tl.int64) * outputs + n
        token = pair // CHOSEN
        source = x + token[:, None] * K
        dtype = y.dtype.element_ty
        precision: tl.constexpr = "ieee" if IEEE else "tf32"
        acc = tl.zeros([BN, BM], tl.float32)
        if ROUNDED:
            acc = sum_of_codes(
                w, output, there, x, token, held, K, w_scales, w_groups, w_size, w_offset,
                x_scales, x_stride, x_groups, x_size, x_offset, BN, BM, GROUPED,
            )  # fmt: skip
        elif KIND is None:
            line = w + output[:, None] * K
            k = tl.arange(0, BK)
            for i in range(0, K, BK):
                inside = (i + k < K)[None, :]
                a = tl.load(line + i + k[None, :], mask=there[:, None] & inside, other=0.0)
                b = tl.load(source + i + k[None, :], mask=held[:, None] & inside, other=0.0)
                acc = tl.dot(a, tl.trans(b), acc, input_precision=precision)
        else:
            k = tl.arange(0, HALF_BLOCK)
            for i in range(0, K, 2 * HALF_BLOCK):
                a, far_a = two_halves(
                    codes, output, there, i, K, scales, zeros, groups, num_groups, group_size,
                    offset, KIND, BITS, MIDDLE, ZEROS, BY_COLUMN,
                )  # fmt: skip
                at_k = source + k[None, :] + i
                b = tl.load(at_k, mask=held[:, None] & (k + i < K)[None, :], other=0.0)
                far = held[:, None] & (k + i + HALF_BLOCK < K)[None, :]
                far_b = tl.load(at_k + HALF_BLOCK, mask=far, other=0.0)
                acc = tl.dot(a.to(dtype), tl.trans(b), acc, input_precision=precision)
                acc = tl.dot(far_a.to(dtype), tl.trans(far_b), acc, input_precision=precision)
        value = acc.to(dtype).to(tl.float32)
        if BIAS:
            extra = tl.load(bias + expert * outputs + n, mask=there, other=0.0)
            value = (value + extra.to(tl.float32)[:, None]).to(dtype).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(value, (BN // 2, 2, BM)), (0, 2, 1)))
            value = clamped(gate, up, alpha, limit) if CLAMPED else gated(gate, up, dtype)
            n = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
            there = n < N
        to = y + pair[None, :] * N + n[:, None]
        tl.store(to, value.to(dtype), mask=there[:, None] & held[None, :])


@triton.jit(do_not_specialize=["first", "last"])
def _combine(
    y, weights, chosen, shared, out, first, last, WIDTH: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr, SHARED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Σ weight · y over a token's pairs with experts from ``first`` up to ``last``, + shared, to
    out [T, WIDTH]. Grid (T, pieces of a row)."""
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(CHOSEN):
        pair = row * CHOSEN + j
        expert = tl.where(mask, tl.load(chosen + pair), -1)
        mine = (expert >= first) & (expert < last)
        value = tl.load(y + pair * WIDTH + at, mask=mine, other=0.0)
        total += tl.load(weights + pair) * value.to(tl.float32)
    if SHARED:
        total += tl.load(shared + row * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, total.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Sorted:
    """Pairs by expert: those of the e-th of this rank are ``pairs[starts[e] : starts[e + 1]]``."""

    pairs: Tensor  # [T · chosen], int32
    starts: Tensor  # [experts + 1], int32
    experts: int
    each: float  # pairs of an expert, on average


def sort(chosen: Tensor, first: int, experts: int, total: int) -> Sorted:
    """The pairs of ``chosen`` [T, chosen], int32, with the ``experts`` from ``first`` on, of
    ``total``."""
    count = chosen.numel()
    pairs = torch.empty(count, dtype=torch.int32, device=chosen.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    block = 512 if count <= 512 else 4096
    _sort[(experts,)](
        chosen, pairs, starts, count, first, BLOCK=block, num_warps=4 if block == 512 else 8,
        **chained(chosen.device),
    )  # fmt: skip
    return Sorted(pairs, starts, experts, count / total)


# By the pairs of an expert, on average. Not tuned yet.
_TILES = (Tile(16, 64, 6, 4), Tile(32, 64, 6, 4), Tile(64, 128, 4, 8), Tile(128, 128, 3, 8))


def _tile(each: float) -> Tile:
    return next((tile for tile in _TILES if each <= tile.rows), _TILES[-1])


def _operands(x: Tensor, weight: Tensor | Coded) -> tuple[Tensor, Tensor | None, dict[str, object]]:
    """What the kernel multiplies: x, the weight if that is not in codes which become numbers, and
    the arguments of codes."""
    if not isinstance(weight, Coded):
        return x, weight, arguments(None) | fp8_product.arguments(None, None)
    if fp8_product.serves(weight):
        x, numbers, more = fp8_product.operands(x, weight)
        return x, numbers, arguments(None) | more
    if weight.rounder is not None:
        x = weight.rounder.values(x)
    return x, None, arguments(weight) | fp8_product.arguments(None, None)


def product(
    x: Tensor, weight: Tensor | Coded, order: Sorted, chosen: int, bias: Tensor | None = None,
    *, gated: bool = False, clamp: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """x [pairs / chosen, K] by ``weight`` [experts, N, K] transposed + bias [experts, N], in x's
    type: [pairs, N], of which rows of other ranks' experts hold anything. Where the weight has a
    rounder, x is rounded.

    ``gated``: a weight's halves are gate and up, and the result is silu(gate) · up [pairs, N / 2]
    or, with ``clamp`` = (alpha, limit), that of ``elementwise.clamped``.
    """
    experts, outputs, inputs = weight.shape
    outputs = outputs // 2 if gated else outputs
    count = len(order.pairs)
    y = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    tile = _tile(order.each)
    used = min(count, experts)
    most_tiles = used + (count - used) // tile.rows
    alpha, limit = clamp or (0.0, 0.0)
    x, numbers, codes = _operands(x, weight)
    grid = triton.cdiv(outputs, tile.outputs // 2 if gated else tile.outputs), most_tiles
    _product[grid](
        x, numbers, bias, y, order.pairs, order.starts, outputs, inputs, alpha, limit,
        CHOSEN=chosen, EXPERTS=experts, EP=triton.next_power_of_2(experts), BM=tile.rows,
        BN=tile.outputs, BK=BLOCK_K * 2 // y.dtype.itemsize, GATED=gated,
        CLAMPED=clamp is not None, BIAS=bias is not None, IEEE=y.dtype == torch.float32,
        ROUNDED=x.dtype == torch.float8_e4m3fn,
        num_warps=tile.warps, num_stages=tile.stages_on(shared_memory(x.device)),
        **codes, **chained(x.device),
    )  # fmt: skip
    return y


def combine(
    y: Tensor, weights: Tensor, chosen: Tensor, first: int, experts: int, shared: Tensor | None
) -> Tensor:
    """Σ weight · y [T, N] over each token's pairs with the ``experts`` from ``first`` on, in the
    order of their choice, + shared [T, N]; y is [T · chosen, N]."""
    rows, each = chosen.shape
    width = y.shape[1]
    out = torch.empty(rows, width, dtype=y.dtype, device=y.device)
    _combine[(rows, triton.cdiv(width, 1024))](
        y, weights, chosen, shared, out, first, first + experts, WIDTH=width, CHOSEN=each,
        BLOCK=1024, SHARED=shared is not None, **chained(y.device),
    )  # fmt: skip
    return out
