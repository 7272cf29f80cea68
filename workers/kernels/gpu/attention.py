"""Paged causal attention (FlashAttention's online softmax, arXiv 2307.08691, over a paged cache).

Two kernels that agree in every bit: ``decode`` for rows of one query, cut into spans of ``SPLIT``
keys that are computed side by side and then merged, and ``prefill`` for rows of several queries,
which takes the same spans one after the other. So it does not matter whether a token was decoded,
recomputed after preemption, or part of a prompt, nor how that was cut. What makes it so:

- a span is the same keys in both, in the same blocks of keys (``_block``), from its start;
- the running maximum is rounded up to a whole number (of powers of two), so that every later
  rescaling is a multiplication by a power of two, which is exact: it does not matter when it is
  done, nor whether the compiler makes one instruction of a product and a sum;
- probabilities are summed by a matrix product with ones, whose order does not depend on how many
  threads share a tile, as that of a reduction does.

A layer's cache is [num_blocks, 2, kv_heads, block_size, D], or of latents [num_blocks, 1, kv_heads,
block_size, R + D], where the last D elements of a key are its value. One of 8-bit floats
(workers/kernels/fp8_cache.py) has a byte more for each vector: behind the codes of a head in a
block are the exponents of its block_size scales. Decode is bound by reading it, prefill by its
products: 4 · T · context · heads · D operations, and a twelfth of that for the sums.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained
from workers.kernels.gpu.e4m3 import from_e4m3
from workers.kernels.gpu.fp8_cache import is_fp8, scales

SPLIT = 512  # keys of a span: enough of these keep a GPU busy, few enough cost little to merge
MOST_PART = 16  # query heads over one latent that share a program
FEW_PROGRAMS = 256  # of decode
LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
_NOTHING = tl.constexpr(-1e30)  # the maximum of no keys


@triton.jit
def _power(exponent):
    """2 ** exponent for whole exponents of at most 0, exactly; below 2 ** -126 it is 0."""
    k = tl.maximum(exponent, -127.0).to(tl.int32)
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _read(at, d, mask, dtype: tl.constexpr, FP8: tl.constexpr):
    """Elements d of the vectors at pointers ``at`` [N]; of codes, before their scale."""
    x = tl.load(at[:, None] + d[None, :], mask=mask, other=0)
    if FP8:
        x = from_e4m3(x).to(dtype)
    return x


@triton.jit
def _blocks(
    most, total, acc, q, front, positions, cache, table, head, start, low, stop, scale, window,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, FP8: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Goes on with ``_span`` over keys start to stop - 1. Not MASKED: every query sees all of them,
    and they are whole blocks of N keys."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    d = tl.arange(0, DP)
    ones = tl.full([N, 16], 1.0, q.dtype)
    per_head: tl.constexpr = BLOCK_SIZE * (R + D + FP8)
    first = tl.arange(0, 16)[None, :] == 0
    for at in range(start, stop, N):
        key = at + tl.arange(0, N)
        there = key >= 0
        if MASKED:
            there = (key >= low) & (key < stop)
        if BLOCK_SIZE % N == 0:  # one block, which ``at`` is inside of
            block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
        else:
            block = tl.load(table + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        inside = there[:, None] & (d < D)[None, :]
        if R > 0:
            keys = cache + (block * KV_HEADS + head) * per_head
            values = keys
            cell = key % BLOCK_SIZE * (R + D)
            v = _read(values + cell + R, d, inside, q.dtype, FP8)
            r = tl.arange(0, RP)
            turned = there[:, None] & (r < R)[None, :]
            f = _read(keys + cell, r, turned, q.dtype, FP8)
            s = tl.dot(q, tl.trans(v), input_precision=precision)
            s = tl.dot(front, tl.trans(f), s, input_precision=precision) * scale
        else:
            keys = cache + (block * (2 * KV_HEADS) + head) * per_head
            values = keys + KV_HEADS * per_head
            cell = key % BLOCK_SIZE * D
            k = _read(keys + cell, d, inside, q.dtype, FP8)
            v = _read(values + cell, d, inside, q.dtype, FP8)
            s = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        if FP8:  # powers of two: it does not matter where they are multiplied by
            at_scale = BLOCK_SIZE * (R + D) + key % BLOCK_SIZE
            s *= scales(tl.load(keys + at_scale, mask=there, other=0))[None, :]
        if CAP > 0:  # soft cap (Gemma 2): cap · tanh(s / cap)
            s = CAP * _LOG2E * (2 * tl.sigmoid(s * (2 / (CAP * _LOG2E))) - 1)
        if MASKED:
            seen = key[None, :] <= positions[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > positions[:, None] - window)
            s = tl.where(seen, s, _NOTHING)
        higher = tl.maximum(most, tl.ceil(tl.max(s, 1)))
        p = tl.exp2(s - higher[:, None])
        if MASKED:
            p = tl.where(seen, p, 0.0)
        less = _power(most - higher)
        sums = tl.dot(p.to(q.dtype), ones, input_precision=precision)
        if FP8:
            p *= scales(tl.load(values + at_scale, mask=there, other=0))[None, :]
        total = total * less + tl.sum(tl.where(first, sums, 0.0), 1)
        acc = acc * less[:, None] + tl.dot(p.to(q.dtype), v, input_precision=precision)
        most = higher
    return most, total, acc


@triton.jit
def _span(
    q, front, positions, cache, table, head, start, low, seen_by_all, stop, scale, window,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, FP8: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Attention of q [M, DP] at ``positions`` [M] over keys start to stop - 1 of one sequence; of
    those before ``low`` no query sees any, and their blocks may hold anything. Without a window
    every query sees those before ``seen_by_all``. Of latents, ``front`` [M, RP] are the queries'
    first R elements and q the others.

    ``scale`` has log2(e) in it. Returns maximum [M], sum [M] and weighted values [M, DP] of the
    exponentials (powers of two) less that maximum.
    """
    most = tl.full([M], _NOTHING, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    if not WINDOW:
        whole = tl.maximum(tl.minimum(seen_by_all, stop) - start, 0) // N * N
        most, total, acc = _blocks(
            most, total, acc, q, front, positions, cache, table, head, start, low, start + whole,
            scale, window, KV_HEADS, D, DP, R, RP, BLOCK_SIZE, N, False, WINDOW, CAP, FP8, IEEE,
        )  # fmt: skip
        start += whole
    return _blocks(
        most, total, acc, q, front, positions, cache, table, head, start, low, stop, scale, window,
        KV_HEADS, D, DP, R, RP, BLOCK_SIZE, N, True, WINDOW, CAP, FP8, IEEE,
    )  # fmt: skip


@triton.jit
def _merged(first, last, item, heads, mine, partial, stats, D: tl.constexpr, DP: tl.constexpr,
            HEADS: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Spans first to last of a row whose span 0 would be item ``item``, in order: maximum [M], sum
    [M] and weighted values [M, DP] of its ``heads`` [M]."""
    d = tl.arange(0, DP)
    valid = (heads < HEADS) & (tl.sum(mine.to(tl.int32), 1) > 0)
    most = tl.full([M], _NOTHING, tl.float32)
    for span in range(first, last + 1):
        index = ((item + span) * HEADS + heads).to(tl.int64)
        most = tl.maximum(
            most, tl.load(stats + index * 2, mask=valid, other=_NOTHING, cache_modifier=".cg")
        )
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    for span in range(first, last + 1):
        index = ((item + span) * HEADS + heads).to(tl.int64)
        less = _power(
            tl.load(stats + index * 2, mask=valid, other=_NOTHING, cache_modifier=".cg") - most
        )
        total += less * tl.load(stats + index * 2 + 1, mask=valid, other=0.0, cache_modifier=".cg")
        part = tl.load(
            partial + index[:, None] * D + d[None, :], mask=mine, other=0.0, cache_modifier=".cg"
        )
        acc += part * less[:, None]
    return most, total, acc


@triton.jit
def _decode(
    q, q_stride, cache, tables, table_stride, items, counts, out, partial, stats, done, sinks,
    scale, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, FP8: tl.constexpr,
    IEEE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Rows of one query. An item is (token, slot, context, span), those of a row side by side;
    ``counts[0]`` says how many.

    Programs go through items and parts in turn, so that the grid need not know their number; a part
    is a kv head with its GROUP query heads, or with some of them. The spans of a row wait in
    ``partial`` and ``stats``; ``done`` [items, parts], zero between launches, counts them at the
    row's first item, and the program that finds them all there merges them, always in order.
    """
    begin(CHAINED)
    m = tl.arange(0, M)
    d = tl.arange(0, DP)
    work = tl.program_id(0)
    end = tl.load(counts) * PARTS
    while work < end:
        item = work // PARTS
        part = work % PARTS
        token = tl.load(items + 4 * item).to(tl.int64)
        slot = tl.load(items + 4 * item + 1).to(tl.int64)
        context = tl.load(items + 4 * item + 2)
        span = tl.load(items + 4 * item + 3)
        start = span * SPAN
        stop = tl.minimum(start + SPAN, context)
        low = 0
        if WINDOW:
            low = tl.maximum(context - window, 0)
            start = tl.maximum(start, low // N * N)
        if start < stop:
            mine = (m < GROUP)[:, None] & (d < D)[None, :]
            heads = part * GROUP + m
            at = q + token * q_stride + heads[:, None] * (R + D)
            query = tl.load(at + R + d[None, :], mask=mine, other=0.0)
            front = query
            if R > 0:
                r = tl.arange(0, RP)
                front = tl.load(
                    at + r[None, :], mask=(m < GROUP)[:, None] & (r < R)[None, :], other=0.0
                )
            positions = tl.full([M], 0, tl.int32) + (context - 1)
            most, total, acc = _span(
                query, front, positions, cache, tables + slot * table_stride,
                part // (PARTS // KV_HEADS), start, low, context, stop, scale, window, KV_HEADS, D,
                DP, R, RP, BLOCK_SIZE, M, N, WINDOW, CAP, FP8, IEEE,
            )  # fmt: skip
            first = low // SPAN
            last = (context - 1) // SPAN
            finish = first == last
            if first < last:
                index = (item * HEADS + heads).to(tl.int64)
                tl.store(partial + index[:, None] * D + d[None, :], acc, mask=mine)
                tl.store(stats + index * 2, most, mask=m < GROUP)
                tl.store(stats + index * 2 + 1, total, mask=m < GROUP)
                tl.debug_barrier()  # all of it is written before it is counted
                counter = done + (item - span) * PARTS + part
                before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
                finish = before == last - first
                if finish:
                    tl.store(counter, 0)
                    tl.debug_barrier()
                    most, total, acc = _merged(
                        first, last, item - span, heads, mine, partial, stats, D, DP, HEADS, M
                    )
            if finish:
                if SINK:
                    sink = tl.load(sinks + heads, mask=m < GROUP, other=0.0).to(tl.float32)
                    total += tl.exp2(sink * _LOG2E - most)
                value = acc / total[:, None]
                to = out + token * (HEADS * D) + heads[:, None] * D + d[None, :]
                tl.store(to, value.to(out.dtype.element_ty), mask=mine)
        work += tl.num_programs(0)


@triton.jit
def _prefill(
    q, q_stride, cache, tables, table_stride, slots, contexts, starts, items, counts,
    out, sinks, scale, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, FP8: tl.constexpr,
    IEEE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Rows of several queries. An item is (row, tile): M // GROUP queries of the row, each with the
    query heads of a part (see ``_decode``); ``counts[1]`` says how many there are, ``starts``
    [rows + 1] where each row's queries begin."""
    begin(CHAINED)
    item = tl.program_id(0)
    part = tl.program_id(1)
    if item < tl.load(counts + 1):
        row = tl.load(items + 2 * item)
        tile = tl.load(items + 2 * item + 1)
        start = tl.load(starts + row)
        count = tl.load(starts + row + 1) - start
        context = tl.load(contexts + row)
        slot = tl.load(slots + row).to(tl.int64)
        m = tl.arange(0, M)
        d = tl.arange(0, DP)
        query = tile * (M // GROUP) + m // GROUP
        valid = (m < M // GROUP * GROUP) & (query < count)
        positions = tl.where(valid, context - count + query, -1)
        heads = part * GROUP + m % GROUP
        token = (start + query).to(tl.int64)
        mine = valid[:, None] & (d < D)[None, :]
        at_q = q + token[:, None] * q_stride + heads[:, None] * (R + D)
        tile_q = tl.load(at_q + R + d[None, :], mask=mine, other=0.0)
        front = tile_q
        if R > 0:
            r = tl.arange(0, RP)
            front = tl.load(at_q + r[None, :], mask=valid[:, None] & (r < R)[None, :], other=0.0)
        stop = context - count + tl.minimum((tile + 1) * (M // GROUP), count)
        low = 0
        if WINDOW:
            low = tl.maximum(context - count + tile * (M // GROUP) - window + 1, 0)
        most = tl.full([M], _NOTHING, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DP], tl.float32)
        for at in range(low // SPAN * SPAN, stop, SPAN):
            first = at
            if WINDOW:
                first = tl.maximum(at, low // N * N)
            most_s, total_s, acc_s = _span(
                tile_q, front, positions, cache, tables + slot * table_stride,
                part // (PARTS // KV_HEADS), first, low,
                context - count + tile * (M // GROUP) + 1, tl.minimum(at + SPAN, stop), scale,
                window, KV_HEADS, D, DP, R, RP, BLOCK_SIZE, M, N, WINDOW, CAP, FP8, IEEE,
            )  # fmt: skip
            higher = tl.maximum(most, most_s)
            less, less_s = _power(most - higher), _power(most_s - higher)
            total = total * less + total_s * less_s
            acc = acc * less[:, None] + acc_s * less_s[:, None]
            most = higher
        if SINK:
            sink = tl.load(sinks + heads).to(tl.float32)
            total += tl.exp2(sink * _LOG2E - most)
        done = acc / total[:, None]
        to = out + token[:, None] * (HEADS * D) + heads[:, None] * D + d[None, :]
        tl.store(to, done.to(out.dtype.element_ty), mask=mine)


@dataclass(frozen=True, slots=True)
class Rows:
    """What attention must know of a step's R rows; int32, on the device.

    Token t of row r is ``starts[r] + t``. ``decode`` [n, 4] are (token, slot, context, span of
    SPLIT keys) of rows of one query, ``prefill`` [n, 2] are (row, tile) of the others; ``counts``
    [2] says how many of each there are, as there may be room for more.
    """

    slots: Tensor  # [R]
    contexts: Tensor  # [R], this step's tokens included
    starts: Tensor  # [R + 1]
    counts: Tensor  # [2]
    decode: Tensor
    prefill: Tensor


@dataclass(frozen=True, slots=True)
class Traits:
    """How a layer attends. ``cap`` is a soft cap of the logits, ``sinks`` [heads] logits that take
    a share of every query's attention and give nothing; ``latent``: a key's last so many elements
    are its value."""

    heads: int
    scale: float
    window: int | None = None
    cap: float = 0.0
    sinks: Tensor | None = None
    latent: int | None = None


class Scratch:
    """Where spans of ``decode`` wait to be merged; room for ``items`` of them, with ``parts`` of
    all ``heads`` and values of ``dim``."""

    def __init__(self, items: int, heads: int, parts: int, dim: int, device: torch.device) -> None:
        self.done = torch.zeros(items, parts, dtype=torch.int32, device=device)
        self.partial = torch.empty(items, heads, dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(items, heads, 2, dtype=torch.float32, device=device)


def parts_of(heads: int, kv_heads: int, latent: bool) -> int:
    """Into how many parts the query heads go that share a program: a kv head's are together, but
    those over a latent are too many."""
    group = heads // kv_heads
    if not latent:
        return kv_heads
    return heads // max(n for n in range(1, MOST_PART + 1) if group % n == 0)


def _block(dim: int, dtype: torch.dtype) -> int:
    """Keys of a step of the loops, whose keys and values have room beside the queries."""
    return 64 if dim <= 256 else 64 // dtype.itemsize


def _tile(heads: int, parts: int, dim: int, dtype: torch.dtype) -> int:
    """Rows of a tile of ``_prefill``: what leaves room for keys and values beside it."""
    width = max(16, triton.next_power_of_2(dim)) * dtype.itemsize
    most = 128 if width <= 256 else 64 if width <= 512 else 32
    return int(max(most, triton.next_power_of_2(heads // parts)))


def tile_queries(heads: int, parts: int, dim: int, dtype: torch.dtype) -> int:
    """How many queries of a row an item of ``prefill`` takes; ``dim`` is that of a value."""
    return _tile(heads, parts, dim, dtype) // (heads // parts)


def _options(q: Tensor, cache: Tensor, traits: Traits) -> dict[str, Any]:
    _, planes, kv_heads, block_size, width = cache.shape
    fp8 = is_fp8(cache)
    width -= fp8
    dim = traits.latent or width
    parts = parts_of(traits.heads, kv_heads, planes == 1)
    return {
        "HEADS": traits.heads, "KV_HEADS": kv_heads, "PARTS": parts,
        "GROUP": traits.heads // parts, "D": dim, "DP": max(16, triton.next_power_of_2(dim)),
        "R": width - dim, "RP": max(16, triton.next_power_of_2(width - dim)),
        "BLOCK_SIZE": block_size, "N": _block(dim, q.dtype), "SPAN": SPLIT,
        "WINDOW": traits.window is not None, "CAP": traits.cap, "SINK": traits.sinks is not None,
        "FP8": fp8, "IEEE": q.dtype == torch.float32,
        # No product and sum become one instruction, which rounds once instead of twice, in one of
        # the loops and not in another.
        "enable_fp_fusion": False, **chained(cache.device),
    }  # fmt: skip


def decode(
    q: Tensor, cache: Tensor, tables: Tensor, rows: Rows, traits: Traits, scratch: Scratch,
    out: Tensor, programs: int,
) -> None:  # fmt: skip
    """Attention of the rows of one query: q [T, heads · (R + D)] to ``out`` [T, heads · D].

    ``tables`` [slots, blocks] int32 are the block tables. ``programs`` is the size of the grid.
    """
    options = _options(q, cache, traits)
    _decode[(programs,)](
        q, q.stride(0), cache, tables, tables.stride(0), rows.decode, rows.counts, out,
        scratch.partial, scratch.stats, scratch.done, traits.sinks, traits.scale * LOG2E,
        traits.window or 0, M=max(16, triton.next_power_of_2(options["GROUP"])),
        # Many programs hide each other's latencies, few hide their own.
        num_warps=4 if programs <= FEW_PROGRAMS or options["D"] > 256 else 2, num_stages=2,
        **options,
    )  # fmt: skip


def prefill(
    q: Tensor, cache: Tensor, tables: Tensor, rows: Rows, traits: Traits, out: Tensor
) -> None:
    """Attention of the rows of several queries: as ``decode``."""
    options = _options(q, cache, traits)
    tile = _tile(traits.heads, options["PARTS"], options["D"], q.dtype)
    _prefill[(len(rows.prefill), options["PARTS"])](
        q, q.stride(0), cache, tables, tables.stride(0), rows.slots, rows.contexts, rows.starts,
        rows.prefill, rows.counts, out, traits.sinks, traits.scale * LOG2E, traits.window or 0,
        M=tile, num_warps=4 if tile <= 64 and options["D"] <= 256 else 8, num_stages=2, **options,
    )  # fmt: skip
