"""Draws from the whole vocabulary: an exponential race of classes, then one inside the winner.

The algorithm is that of ``workers.sampler`` (its docstring names the sources): token i belongs to
class i % CLASSES; top_p is by rejection, which looks at a row once more for each turn. Masses are
relative to the likeliest token's. Bound by reading the logits twice, once for their maxima.
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
)
from workers.kernels.gpu.sampling_slots import word

MASS_PIECE = 4096  # tokens that one program adds up to masses of classes
ROW_PIECE = 16384  # tokens that a row's program looks at together when it draws again
GREEDY, TOP_K, TOP_P = word("greedy"), word("top_k"), word("top_p")
INVERSE_TEMPERATURE, MIN_P = word("inverse_temperature"), word("min_p")


@triton.jit
def is_drawn_from_all(records, slot, most):
    """Whether the row is drawn, without top_k, and has not failed (its largest logit is finite)."""
    drawn = (integer(records, slot, GREEDY) == 0) & (integer(records, slot, TOP_K) == 0)
    return drawn & (most < INF)


@triton.jit
def chances(x, most, scale, min_p):
    """Probabilities relative to the likeliest token's, those under ``min_p`` as 0."""
    p = tl.exp((x - most) * scale)
    return tl.where(p >= min_p, p, 0.0)


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def class_masses(logits, edited, slots, positions, records, top, masses, V: tl.constexpr,
                 STRIDE: tl.constexpr, LINES: tl.constexpr, CLASSES: tl.constexpr):  # fmt: skip
    """Grid (pieces, n). masses [n, pieces, CLASSES] float32: the mass of each class within the
    piece, of LINES * CLASSES tokens."""
    piece, row = tl.program_id(0), tl.program_id(1)
    slot, most = tl.load(slots + row), tl.load(top + row)
    if is_drawn_from_all(records, slot, most):
        changed = is_edited(records, slot, tl.load(positions + row)).to(tl.int32)
        column = tl.arange(0, CLASSES)
        ids = (piece * LINES + tl.arange(0, LINES)[:, None]) * CLASSES + column[None, :]
        x = load_logits(logits, edited, row, changed, ids, ids < V, STRIDE, True)
        scale, min_p = real(records, slot, INVERSE_TEMPERATURE), real(records, slot, MIN_P)
        mass = tl.sum(chances(x, most, scale, min_p), 0)
        tl.store(masses + (row * tl.num_programs(0) + piece) * CLASSES + column, mass)


@triton.jit
def race(chance, noise, ids, last):
    """The id of the largest chance / noise (1-d), of equal ones the lowest; ``last`` is any upper
    bound of ids."""
    ratio = chance.to(tl.float64) / noise
    return tl.min(tl.where(ratio == tl.max(ratio, 0), ids, last), 0)


@triton.jit
def draw_once(mass, key, turn, chance, token, logits, edited, changed, row, most, scale, min_p,
              V: tl.constexpr, STRIDE: tl.constexpr, CLASSES: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    """Draws a token among those that are likelier than ``token``, whose probability is ``chance``
    (all, if that is negative); mass [CLASSES] is theirs. Returns it with its own probability."""
    index = turn * (CLASSES + (V + CLASSES - 1) // CLASSES)
    column, line = tl.arange(0, CLASSES), tl.arange(0, WIDTH)
    chosen = race(mass, exponential(key, index + column), column, CLASSES - 1)
    ids = line * CLASSES + chosen
    x = load_logits(logits, edited, row, changed, ids, ids < V, STRIDE, True)
    p = chances(x, most, scale, min_p)
    p = tl.where((p > chance) | ((p == chance) & (ids < token)), p, 0.0)
    token = race(p, exponential(key, index + CLASSES + line), ids, V - 1)
    return token, tl.sum(tl.where(ids == token, p, 0.0), 0)


@triton.jit
def masses_over(chance, token, logits, edited, changed, row, most, scale, min_p,
                V: tl.constexpr, STRIDE: tl.constexpr, LINES: tl.constexpr,
                CLASSES: tl.constexpr):  # fmt: skip
    """[CLASSES]: the masses of those tokens of each class that are likelier than ``token``, whose
    probability is ``chance``; of equal ones the lower id counts as likelier."""
    sums = tl.zeros((LINES, CLASSES), tl.float32)
    line, column = tl.arange(0, LINES)[:, None], tl.arange(0, CLASSES)[None, :]
    for first in range(0, (V + CLASSES - 1) // CLASSES, LINES):
        ids = (first + line) * CLASSES + column
        x = load_logits(logits, edited, row, changed, ids, ids < V, STRIDE, True)
        p = chances(x, most, scale, min_p)
        sums += tl.where((p > chance) | ((p == chance) & (ids < token)), p, 0.0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def draw_from_all(logits, edited, slots, positions, records, top, masses, sampled, tokens,
                  MAX_LEN: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr,
                  PIECES: tl.constexpr, LINES: tl.constexpr, CLASSES: tl.constexpr,
                  WIDTH: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Grid (n,). Draws a token for each row without top_k from its masses [n, PIECES, CLASSES].

    LINES: how many tokens of a class are looked at together when a row is drawn from again.
    WIDTH: a power of two, at least the tokens of a class.
    """
    row = tl.program_id(0)
    slot, position, most = tl.load(slots + row), tl.load(positions + row), tl.load(top + row)
    if is_drawn_from_all(records, slot, most):
        changed = is_edited(records, slot, position).to(tl.int32)
        scale, min_p = real(records, slot, INVERSE_TEMPERATURE), real(records, slot, MIN_P)
        key = noise_key(records, slot, position)
        mass = tl.zeros((CLASSES,), tl.float32)
        for start in range(0, PIECES, 16):
            piece = start + tl.arange(0, 16)[:, None]
            at = (row * PIECES + piece) * CLASSES + tl.arange(0, CLASSES)[None, :]
            mass += tl.sum(tl.load(masses + at, mask=piece < PIECES, other=0.0), 0)
        token, chance = draw_once(mass, key, 0, -1.0, 0, logits, edited, changed, row, most, scale,
                                  min_p, V, STRIDE, CLASSES, WIDTH)  # fmt: skip
        top_p, total, turn = real(records, slot, TOP_P), tl.sum(mass, 0), 0
        limit = top_p * total
        # What is likelier is at most all the others: that settles most draws of a sharp
        # distribution without another look.
        open_ = (top_p < 1) & (total - chance >= limit)
        while open_:
            mass = masses_over(chance, token, logits, edited, changed, row, most, scale, min_p,
                               V, STRIDE, LINES, CLASSES)  # fmt: skip
            total = tl.sum(mass, 0)
            open_ = total >= limit
            if open_:
                turn += 1
                token, chance = draw_once(mass, key, turn, chance, token, logits, edited,
                                          changed, row, most, scale, min_p, V, STRIDE, CLASSES,
                                          WIDTH)  # fmt: skip
                open_ = total - chance >= limit
        settle(token, row, slot, position, sampled, tokens, MAX_LEN, KEEP)
