"""allowed_token_ids, bad_words, min_tokens, logit_bias and penalties: logits before the draw.

Only rows that have any of these are copied, in float32; the logits stay as they are. Then one
program for each row touches the few tokens that its slot names. Bound by the copy, and for
penalties by the scattered reads of as many tokens as the sequence has.
"""

import triton
import triton.language as tl

from workers.kernels.gpu.sampling_rows import INF, integer, is_edited, real
from workers.kernels.gpu.sampling_slots import WORDS, word

LISTS = word("lists")
NUM_ALLOWED, NUM_STOPS, NUM_BIASES = word("num_allowed"), word("num_stops"), word("num_biases")
NUM_WORDS, LONGEST, STOPS_UNTIL = word("num_words"), word("longest"), word("stops_until")
PROMPT_LEN, PENALIZED, REPETITION = word("prompt_len"), word("penalized"), word("repetition")
FREQUENCY, PRESENCE = word("frequency"), word("presence")
LIST_BLOCK, WORD_BLOCK, PAST_BLOCK = tl.constexpr(1024), tl.constexpr(64), tl.constexpr(1024)
CLAIMED = tl.constexpr(1 << 30)  # this bit of a count says that its token was seen to


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def copy_edited(logits, edited, bad, slots, positions, records, V: tl.constexpr,
                STRIDE: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """Grid (pieces, n). Copies the rows of logits [n, STRIDE] that are edited to ``edited``, of
    that shape in float32, or -inf where allowed_token_ids say what is allowed.

    bad [n, pieces] int32 is 1 where such a piece holds NaN or +inf, which might get lost.
    """
    piece, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if is_edited(records, slot, tl.load(positions + row)):
        ids = piece * PIECE + tl.arange(0, PIECE)
        at = row.to(tl.int64) * STRIDE + ids
        x = tl.load(logits + at, mask=ids < V, other=-INF).to(tl.float32)
        wrong = tl.max(((x != x) | (x == INF)).to(tl.int32), 0)
        tl.store(bad + row * tl.num_programs(0) + piece, wrong)
        x = tl.where(integer(records, slot, NUM_ALLOWED) > 0, -INF, x)
        tl.store(edited + at, x, mask=ids < V)


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def edit_rows(logits, edited, counts, tokens, slots, positions, records, MAX_LEN: tl.constexpr,
              STRIDE: tl.constexpr):  # fmt: skip
    """Grid (n,). Edits the copies in vLLM's order (its V1 sampler).

    counts [n, STRIDE] int32 is scratch of any content, and used for rows with penalties only.
    Steps that touch the same tokens have a barrier between them; two that store -inf need none.
    """
    row = tl.program_id(0)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    if is_edited(records, slot, position):
        first = row.to(tl.int64) * STRIDE
        raw, x = logits + first, edited + first
        lists = tl.load((records + slot * WORDS + LISTS).to(tl.pointer_type(tl.int64)))
        ids = lists.to(tl.pointer_type(tl.int32))
        history = tokens + slot.to(tl.int64) * MAX_LEN

        num = integer(records, slot, NUM_ALLOWED)
        for start in range(0, num, LIST_BLOCK):
            at = start + tl.arange(0, LIST_BLOCK)
            token = tl.load(ids + at, mask=at < num, other=0)
            tl.store(x + token, tl.load(raw + token, mask=at < num).to(tl.float32), mask=at < num)
        tl.debug_barrier()
        ids += num

        num = integer(records, slot, NUM_STOPS)
        if position < integer(records, slot, STOPS_UNTIL):
            for start in range(0, num, LIST_BLOCK):
                at = start + tl.arange(0, LIST_BLOCK)
                token = tl.load(ids + at, mask=at < num, other=0)
                tl.store(x + token, tl.full((LIST_BLOCK,), -INF, tl.float32), mask=at < num)
        ids += num
        num = integer(records, slot, NUM_BIASES)
        ban_words(x, ids + 2 * num, history, slot, position, records)
        tl.debug_barrier()

        for start in range(0, num, LIST_BLOCK):
            at = start + tl.arange(0, LIST_BLOCK)
            token = tl.load(ids + at, mask=at < num, other=0)
            value = tl.load(ids + num + at, mask=at < num, other=0).to(tl.float32, bitcast=True)
            value += tl.load(x + token, mask=at < num, other=0.0)
            tl.store(x + token, value, mask=at < num)
        if integer(records, slot, PENALIZED) != 0:
            tl.debug_barrier()
            penalize(x, counts + first, history, slot, position, records)


@triton.jit
def ban_words(x, words, history, slot, position, records):
    """-inf for each token that would complete one of the slot's bad ``words`` [words, longest]."""
    num, longest = integer(records, slot, NUM_WORDS), integer(records, slot, LONGEST)
    written = position - integer(records, slot, PROMPT_LEN)
    for start in range(0, num, WORD_BLOCK):
        at = start + tl.arange(0, WORD_BLOCK)
        last = tl.load(words + at * longest, mask=at < num, other=-1)
        banned = last >= 0
        for back in range(1, longest):
            # Only output completes a word, so no word may reach back into the prompt.
            token = tl.load(words + at * longest + back, mask=at < num, other=-1)
            recent = tl.load(history + position - back, mask=back <= written, other=-1)
            banned = banned & ((token < 0) | (token == recent))
        tl.store(x + last, tl.full((WORD_BLOCK,), -INF, tl.float32), mask=banned)


@triton.jit
def penalize(x, counts, history, slot, position, records):
    """Repetition (Keskar et al. 2019, CTRL) over prompt and output, frequency and presence over
    the output as the OpenAI API defines them.

    Integer atomics count, so that no order matters. Of the places that a token has in the past
    one claims it, whichever that is, so that it is penalized once.
    """
    prompt_len = integer(records, slot, PROMPT_LEN)
    for start in range(0, position, PAST_BLOCK):
        at = start + tl.arange(0, PAST_BLOCK)
        token = tl.load(history + at, mask=at < position, other=0)
        tl.store(counts + token, tl.full((PAST_BLOCK,), 0, tl.int32), mask=at < position)
    tl.debug_barrier()
    for start in range(0, position, PAST_BLOCK):
        at = start + tl.arange(0, PAST_BLOCK)
        written = (at < position) & (at >= prompt_len)
        token = tl.load(history + at, mask=written, other=0)
        tl.atomic_add(counts + token, tl.full((PAST_BLOCK,), 1, tl.int32), mask=written)
    tl.debug_barrier()
    repetition = real(records, slot, REPETITION)
    frequency, presence = real(records, slot, FREQUENCY), real(records, slot, PRESENCE)
    for start in range(0, position, PAST_BLOCK):
        at = start + tl.arange(0, PAST_BLOCK)
        token = tl.load(history + at, mask=at < position, other=0)
        bit = tl.full((PAST_BLOCK,), CLAIMED, tl.int32)
        count = tl.atomic_or(counts + token, bit, mask=at < position)
        mine = (at < position) & (count < CLAIMED)
        value = tl.load(x + token, mask=mine, other=0.0)
        value = tl.where(value > 0, value / repetition, value * repetition)
        value -= frequency * count.to(tl.float32) + presence * (count > 0).to(tl.float32)
        tl.store(x + token, value, mask=mine)
