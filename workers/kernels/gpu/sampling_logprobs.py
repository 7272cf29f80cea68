"""Log-probabilities: of one token of each row and of the k likeliest, with their ranks.

Of the raw logits. ``sampling_argmax.piece_maxima`` has read them once, for maxima and sums; the
k likeliest are found as in ``sampling_top_k``. Bound by a second reading, which counts how many
tokens are likelier than the one.
"""

import triton
import triton.language as tl

from workers.kernels.gpu.sampling_rows import INF, load_logits, sortable
from workers.kernels.gpu.sampling_top_k import (
    CHUNK,
    LOWEST,
    kth_largest,
    list_candidates,
    load_candidates,
)

MOST_TOP = 128  # the largest k
ROW_PIECE = 8192  # tokens that are compared together
OTHERS = tl.constexpr(32)  # of the k likeliest that each is compared with at a time


@triton.jit(do_not_specialize=["k", "capacity"], do_not_specialize_on_alignment=["rows", "targets"])
def row_logprobs(logits, rows, targets, best, sums, tops, blocks, listed, ids_out, values_out,
                 ranks_out, lse_out, k, capacity, V: tl.constexpr, STRIDE: tl.constexpr,
                 PIECES: tl.constexpr, PIECE_WIDTH: tl.constexpr, ROW_PIECE: tl.constexpr,
                 BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
                 WIDTH: tl.constexpr, MOST_TOP: tl.constexpr):  # fmt: skip
    """Grid (m,). ids, values and ranks [m, 1 + k] (int32, float32, int32) of targets [m] and of
    the k likeliest tokens of row rows[i] of the logits; lse [m] float32, log(sum(exp)) of them.

    A rank is one more than the number of strictly likelier tokens. ``listed`` [m, capacity] and
    ``blocks`` [m, BLOCKS] int32 are scratch.
    """
    at = tl.program_id(0)
    row = tl.load(rows + at)
    piece = tl.arange(0, PIECE_WIDTH)
    x = tl.load(best + at * PIECES + piece, mask=piece < PIECES, other=-INF)
    part = tl.load(sums + at * PIECES + piece, mask=piece < PIECES, other=0.0)
    most = tl.max(x, 0)
    lse = most + tl.log(tl.sum(part * tl.exp(x - tl.where(most == -INF, 0.0, most)), 0))

    token = tl.load(targets + at).to(tl.int32)
    value = load_logits(logits, logits, row, 0, token, token < V, STRIDE, False)
    likelier = tl.zeros((ROW_PIECE,), tl.int32)
    for start in range(0, V, ROW_PIECE):
        ids = start + tl.arange(0, ROW_PIECE)
        likelier += (load_logits(logits, logits, row, 0, ids, ids < V, STRIDE, False) > value).to(
            tl.int32
        )
    out = at.to(tl.int64) * (1 + k)
    tl.store(lse_out + at, lse)
    tl.store(ids_out + out, token)
    tl.store(values_out + out, value - lse)
    tl.store(ranks_out + out, tl.sum(likelier, 0) + 1)
    if k > 0:
        found = listed + at.to(tl.int64) * capacity
        num, low = list_candidates(
            logits, logits, 0, row, most, tops + at * ROW_BLOCKS, k, LOWEST,
            blocks + at * BLOCKS, found, V, STRIDE, BLOCK, BLOCKS, WIDTH, False,
        )  # fmt: skip
        _, first = load_candidates(logits, logits, 0, row, found, 0, num, STRIDE, False)
        low, ties = kth_largest(
            first, logits, logits, 0, row, most, found, num, k, low, STRIDE, False
        )
        pick(logits, row, found, num, low, ties, STRIDE)
        sort(logits, row, found, k, lse, ids_out + out + 1, values_out + out + 1,
             ranks_out + out + 1, STRIDE, MOST_TOP)  # fmt: skip


@triton.jit
def pick(logits, row, found, num, low, ties, STRIDE: tl.constexpr):
    """Moves the k likeliest of the listed tokens, as ``kth_largest`` tells them, to the front."""
    kept, before = 0, 0
    for start in range(0, num, CHUNK):
        ids, x = load_candidates(logits, logits, 0, row, found, start, num, STRIDE, False)
        inside = start + tl.arange(0, CHUNK) < num
        tl.debug_barrier()  # all of the chunk is read before any of it is written over
        tie = (inside & (sortable(x) == low)).to(tl.int32)
        early = (tie > 0) & (before + tl.cumsum(tie, 0) - tie < ties)
        ones = (inside & ((sortable(x) > low) | early)).to(tl.int32)
        tl.store(found + kept + tl.cumsum(ones, 0) - ones, ids, mask=ones > 0)
        kept += tl.sum(ones, 0)
        before += tl.sum(tie, 0)
    tl.debug_barrier()


@triton.jit
def sort(logits, row, found, k, lse, ids_out, values_out, ranks_out, STRIDE: tl.constexpr,
         MOST_TOP: tl.constexpr):  # fmt: skip
    """Writes the first k listed tokens, likeliest first, of equal ones the lower id."""
    at = tl.arange(0, MOST_TOP)
    ids = tl.load(found + at, mask=at < k, other=0)
    x = load_logits(logits, logits, row, 0, ids, at < k, STRIDE, False)
    before, over = tl.zeros((MOST_TOP,), tl.int32), tl.zeros((MOST_TOP,), tl.int32)
    for start in range(0, k, OTHERS):
        other = start + tl.arange(0, OTHERS)
        other_ids = tl.load(found + other, mask=other < k, other=0)
        y = load_logits(logits, logits, row, 0, other_ids, other < k, STRIDE, False)
        greater = (other < k)[None, :] & (y[None, :] > x[:, None])
        equal = (other < k)[None, :] & (y[None, :] == x[:, None])
        earlier = equal & (other_ids[None, :] < ids[:, None])
        over += tl.sum(greater.to(tl.int32), 1)
        before += tl.sum((greater | earlier).to(tl.int32), 1)
    tl.store(ids_out + before, ids, mask=at < k)
    tl.store(values_out + before, x - lse, mask=at < k)
    tl.store(ranks_out + before, over + 1, mask=at < k)
