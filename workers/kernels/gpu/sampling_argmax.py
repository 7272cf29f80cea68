"""The largest logit of each row, in two stages: of pieces of the vocabulary, then of the pieces.

Bound by reading the logits once. The first stage has a program for each piece of each row, so that
a single row keeps the whole card reading; the second has one for each row and reads next to
nothing. It also settles greedy rows, and those that cannot be sampled from.
"""

import triton
import triton.language as tl

from workers.kernels.gpu.sampling_rows import INF, integer, is_edited, load_logits
from workers.kernels.gpu.sampling_slots import word

PIECE = 4096  # tokens of a piece
BLOCK = 32  # tokens whose maximum is kept, for who looks for the largest k
GREEDY = word("greedy")


@triton.jit(do_not_specialize_on_alignment=["rows", "slots", "positions"])
def piece_maxima(logits, edited, rows, slots, positions, records, best, where, sums, tops,
                 V: tl.constexpr, STRIDE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
                 EDITED: tl.constexpr, SUMS: tl.constexpr, TOPS: tl.constexpr):  # fmt: skip
    """Grid (pieces, n). Of each piece: best [n, pieces] float32, the largest logit (+inf if one is
    NaN), and where [n, pieces] int32, the first token that has it.

    SUMS: also sums [n, pieces], of exp(logit - best), of rows[i] of the logits instead of row i.
    TOPS: also tops [n, pieces * PIECE / BLOCK], the largest of each block.
    """
    piece, pieces, at = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = tl.load(rows + at) if SUMS else at
    changed = 0
    if EDITED:
        changed = is_edited(records, tl.load(slots + row), tl.load(positions + row)).to(tl.int32)
    lines: tl.constexpr = PIECE // BLOCK
    ids = piece * PIECE + tl.arange(0, lines)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = load_logits(logits, edited, row, changed, ids, ids < V, STRIDE, EDITED)
    top = tl.max(x, 1)
    most = tl.max(top, 0)
    first = tl.min(tl.min(tl.where((x == most) & (ids < V), ids, V - 1), 1), 0)
    tl.store(best + at * pieces + piece, most)
    tl.store(where + at * pieces + piece, first)
    if SUMS:
        from_ = tl.where(most == -INF, 0.0, most)
        tl.store(sums + at * pieces + piece, tl.sum(tl.sum(tl.exp(x - from_), 1), 0))
    if TOPS:
        tl.store(tops + (at * pieces + piece) * lines + tl.arange(0, lines), top)


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def row_maxima(best, where, bad, slots, positions, records, top, sampled, failed, tokens,
               MAX_LEN: tl.constexpr, V: tl.constexpr, PIECES: tl.constexpr,
               WIDTH: tl.constexpr, EDITED: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Grid (n,). top [n] float32: each row's largest logit, or +inf where the row has failed; then
    failed [n] is 1 and the token 0. The tokens of greedy rows are settled: see ``settle``.

    EDITED: bad [n, pieces] is not 0 where an edited row's logits were not finite before that.
    """
    row = tl.program_id(0)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    at = tl.arange(0, WIDTH)
    x = tl.load(best + row * PIECES + at, mask=at < PIECES, other=-INF)
    most = tl.max(x, 0)
    ids = tl.load(where + row * PIECES + at, mask=at < PIECES, other=V - 1)
    token = tl.min(tl.where(x == most, ids, V - 1), 0)
    ok = (most > -INF) & (most < INF)
    if EDITED:
        seen = tl.where(is_edited(records, slot, position), PIECES, 0)
        ok = ok & (tl.max(tl.load(bad + row * PIECES + at, mask=at < seen, other=0), 0) == 0)
    tl.store(top + row, tl.where(ok, most, INF))
    tl.store(failed + row, tl.where(ok, 0, 1))
    if (integer(records, slot, GREEDY) != 0) | (ok == 0):
        token = tl.where(ok, token, 0)
        settle(token, row, slot, position, sampled, tokens, MAX_LEN, KEEP)


@triton.jit
def settle(token, row, slot, position, sampled, tokens, MAX_LEN: tl.constexpr, KEEP: tl.constexpr):
    """Writes the row's token to sampled [n] int32; with KEEP also to its place in the table
    tokens [num_slots, MAX_LEN] int32, if there is one at ``position``."""
    token = token.to(tl.int32)
    tl.store(sampled + row, token)
    if KEEP:
        place = slot.to(tl.int64) * MAX_LEN + position
        tl.store(tokens + place, token, mask=position < MAX_LEN)
