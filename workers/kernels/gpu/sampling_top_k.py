"""Draws among the k likeliest tokens, which are found without sorting the vocabulary.

The k largest logits are no smaller than the k-th largest of the blocks' maxima. That is found by
bisecting the integers that order as floats do, over V / BLOCK maxima in registers; the few tokens
that reach it are listed, and the k-th largest of these is found in the same way. top_p is the
threshold above which the mass is just short of it, by bisection once more. The race is that of
``workers.sampler``: a token's noise has its id as index.

One program for each row; bound by the latency of its reductions, not by memory.
"""

import triton
import triton.language as tl

from workers.kernels.gpu.sampling_argmax import settle
from workers.kernels.gpu.sampling_rows import (
    INF,
    exponential,
    integer,
    is_edited,
    load_logits,
    noise_key,
    real,
    sortable,
)
from workers.kernels.gpu.sampling_slots import word

CHUNK = tl.constexpr(1024)  # candidates at a time
BLOCK_CHUNK = tl.constexpr(64)  # blocks at a time
LOWEST = tl.constexpr(-2139095041)  # sortable(-inf)
GREEDY, TOP_K, TOP_P = word("greedy"), word("top_k"), word("top_p")
INVERSE_TEMPERATURE, LOG_MIN_P = word("inverse_temperature"), word("log_min_p")


@triton.jit
def middle(low, high):
    """Half-way between two int32, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def list_candidates(logits, edited, changed, row, most, tops, k, least, blocks, found,
                    V: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
                    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, EDITED: tl.constexpr):  # fmt: skip
    """Lists in ``found`` [33 k] int32 the tokens, in order, among which the k likeliest are, of
    those whose sortable logit is at least ``least``; most: the largest logit.

    tops [BLOCKS] are the blocks' maxima; blocks [BLOCKS] int32 is scratch; WIDTH is a power of
    two, at least BLOCKS. Returns how many are listed, and a lower bound of the k-th's sortable
    logit. Of those equal to the bound no more than the first k are listed.
    """
    block = tl.arange(0, WIDTH)
    top = sortable(tl.load(tops + block, mask=block < BLOCKS, other=-INF))
    low, high = tl.full((), least, tl.int32), sortable(most)
    while low < high:
        mid = middle(low, high)
        count = tl.sum((top >= mid).to(tl.int32), 0)
        low = tl.where(count >= k, mid, low)
        high = tl.where(count >= k, high, mid - 1)
        high = tl.where(count == k, mid, high)
    chosen = (top >= low) & (block < BLOCKS)
    marks = chosen.to(tl.int32)
    tl.store(blocks + tl.cumsum(marks, 0) - marks, block, mask=chosen)
    tl.debug_barrier()

    num_blocks, num, ties = tl.sum(marks, 0), 0, 0
    lane = tl.arange(0, BLOCK_CHUNK * BLOCK)
    for start in range(0, num_blocks, BLOCK_CHUNK):
        at = start + lane // BLOCK
        ids = tl.load(blocks + at, mask=at < num_blocks, other=0) * BLOCK + lane % BLOCK
        inside = (at < num_blocks) & (ids < V)
        value = sortable(load_logits(logits, edited, row, changed, ids, inside, STRIDE, EDITED))
        tie = (inside & (value == low)).to(tl.int32)
        early = (tie > 0) & (ties + tl.cumsum(tie, 0) - tie < k)
        ones = ((inside & (value > low)) | early).to(tl.int32)
        tl.store(found + num + tl.cumsum(ones, 0) - ones, ids, mask=ones > 0)
        num += tl.sum(ones, 0)
        ties += tl.sum(tie, 0)
    tl.debug_barrier()
    return num, low


@triton.jit
def load_candidates(logits, edited, changed, row, found, start, num, STRIDE: tl.constexpr,
                    EDITED: tl.constexpr):  # fmt: skip
    """ids and logits [CHUNK] of the listed tokens from number ``start`` on; -inf past the last."""
    at = start + tl.arange(0, CHUNK)
    ids = tl.load(found + at, mask=at < num, other=0)
    return ids, load_logits(logits, edited, row, changed, ids, at < num, STRIDE, EDITED)


@triton.jit
def kth_largest(first, logits, edited, changed, row, most, found, num, k, low,
                STRIDE: tl.constexpr, EDITED: tl.constexpr):  # fmt: skip
    """A threshold of sortable logits: the k likeliest of the ``num`` listed tokens, or all of them,
    are those over it, and the first few of those equal to it: as many as the second result.

    first [CHUNK]: the logits of the first ones, mostly of all, to have them in registers.
    """
    high, over = sortable(most), 0  # always: ``over`` tokens, fewer than k, are over ``high``
    while low < high:
        mid = middle(low, high)
        count = tl.sum((sortable(first) >= mid).to(tl.int32), 0)
        for start in range(CHUNK, num, CHUNK):
            _, x = load_candidates(logits, edited, changed, row, found, start, num, STRIDE, EDITED)
            count += tl.sum((sortable(x) >= mid).to(tl.int32), 0)
        low = tl.where(count > k, mid, tl.where(count == k, mid - 1, low))
        high = tl.where(count > k, high, mid - 1)
        over = tl.where(count > k, over, count)
    return low, tl.minimum(k, num) - over


@triton.jit
def mass(x, threshold, most, scale, least):
    """The mass of the logits x [CHUNK] whose sortable is over ``threshold``, relative to the
    likeliest token's; without those whose log-probability, relative to it, is under ``least``."""
    value = (x - most) * scale
    return tl.sum(tl.where((value >= least) & (sortable(x) > threshold), tl.exp(value), 0.0), 0)


@triton.jit
def mass_over(threshold, first, logits, edited, changed, row, most, scale, least, found, num,
              STRIDE: tl.constexpr, EDITED: tl.constexpr):  # fmt: skip
    """``mass`` of all listed tokens, of which ``first`` [CHUNK] are the first ones' logits."""
    total = mass(first, threshold, most, scale, least)
    for start in range(CHUNK, num, CHUNK):
        _, x = load_candidates(logits, edited, changed, row, found, start, num, STRIDE, EDITED)
        total += mass(x, threshold, most, scale, least)
    return total


@triton.jit
def unsortable(key):
    """The float32 whose ``sortable`` is ``key``."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def within_top_p(low, ties, top_p, first, logits, edited, changed, row, most, scale, least, found,
                 num, STRIDE: tl.constexpr, EDITED: tl.constexpr):  # fmt: skip
    """Narrows what ``kth_largest`` found to the fewest tokens that have the share ``top_p`` of its
    mass. Returns the threshold, how many of those equal to it may be kept, the mass over it, and
    the mass that is wanted."""
    over = mass_over(low, first, logits, edited, changed, row, most, scale, least, found, num,
                     STRIDE, EDITED)  # fmt: skip
    value = (unsortable(low) - most) * scale
    total = over + tl.where(value >= least, tl.exp(value), 0.0) * ties.to(tl.float32)
    limit = top_p * total
    if over >= limit:
        over, ties, high = 0.0, num, sortable(most)
        while low + 1 < high:  # ``limit`` or more is over ``low``, less is over ``high``
            mid = middle(low, high - 1)
            part = mass_over(mid, first, logits, edited, changed, row, most, scale, least, found,
                             num, STRIDE, EDITED)  # fmt: skip
            over = tl.where(part < limit, part, over)
            high = tl.where(part < limit, mid, high)
            low = tl.where(part < limit, low, mid)
        low = high
    return low, ties, over, limit


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["slots", "positions"])
def draw_from_top_k(logits, edited, slots, positions, records, top, tops, blocks, listed, sampled,
                    tokens, capacity, MAX_LEN: tl.constexpr, V: tl.constexpr,
                    STRIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
                    ROW_BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
                    KEEP: tl.constexpr):  # fmt: skip
    """Grid (n,). Draws a token for each row with a top_k.

    top [n]: the rows' largest logits; tops [n, ROW_BLOCKS]: those of their blocks; blocks
    [n, BLOCKS] and listed [n, capacity] int32 are scratch.
    """
    row = tl.program_id(0)
    slot, position, most = tl.load(slots + row), tl.load(positions + row), tl.load(top + row)
    k = integer(records, slot, TOP_K)
    if (integer(records, slot, GREEDY) == 0) & (k > 0) & (most < INF):
        changed = is_edited(records, slot, position).to(tl.int32)
        found = listed + row.to(tl.int64) * capacity
        num, low = list_candidates(
            logits, edited, changed, row, most, tops + row * ROW_BLOCKS, k, LOWEST + 1,
            blocks + row * BLOCKS, found, V, STRIDE, BLOCK, BLOCKS, WIDTH, True,
        )  # fmt: skip
        _, first = load_candidates(logits, edited, changed, row, found, 0, num, STRIDE, True)
        low, ties = kth_largest(
            first, logits, edited, changed, row, most, found, num, k, low, STRIDE, True
        )
        scale = real(records, slot, INVERSE_TEMPERATURE)
        least = real(records, slot, LOG_MIN_P)
        top_p = real(records, slot, TOP_P)

        # Kept are all over ``low``, and of those equal to it the first ``ties``, as far as the
        # mass before each is under ``limit``.
        limit, over = INF, 0.0
        if top_p < 1:
            low, ties, over, limit = within_top_p(
                low, ties, top_p, first, logits, edited, changed, row, most, scale, least, found,
                num, STRIDE, True,
            )  # fmt: skip
        key = noise_key(records, slot, position)
        best, token, before = tl.full((), -INF, tl.float64), V - 1, 0
        for start in range(0, num, CHUNK):
            ids, x = load_candidates(logits, edited, changed, row, found, start, num, STRIDE, True)
            value = (x - most) * scale
            tie = (sortable(x) == low).to(tl.int32)
            rank = before + tl.cumsum(tie, 0) - tie
            early = (rank < ties) & (over + rank.to(tl.float32) * tl.exp(value) < limit)
            keep = (value >= least) & ((sortable(x) > low) | ((tie > 0) & early))
            score = value.to(tl.float64) - tl.log(exponential(key, ids))
            score = tl.where(keep, score, -INF)
            highest = tl.max(score, 0)
            winner = tl.min(tl.where(keep & (score == highest), ids, V - 1), 0)
            token = tl.where(highest > best, winner, token)
            best = tl.maximum(highest, best)
            before += tl.sum(tie, 0)
        settle(token, row, slot, position, sampled, tokens, MAX_LEN, KEEP)
