"""What the sampling kernels share: reading a slot's record, a row's logits, and noise.

Each program serves one row (or a piece of one), in blocks whose sizes depend on the vocabulary
alone. So all sums have one order, and a row's bits never depend on its batch. For the same reason
a kernel with sums is compiled once for all steps: another variant might add in another order.
"""

import triton
import triton.language as tl

from workers.kernels.gpu.sampling_slots import WORDS, word

INF = tl.constexpr(float("inf"))
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64's step; the other two are its mixers
MIX_1, MIX_2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
SEED, EDITED_UNTIL = word("seed"), word("edited_until")


@triton.jit
def integer(records, slot, WORD: tl.constexpr):
    """Word ``WORD`` of the slot's record."""
    return tl.load(records + slot * WORDS + WORD)


@triton.jit
def real(records, slot, WORD: tl.constexpr):
    """The same of a field that is float32."""
    return tl.load(records + slot * WORDS + WORD).to(tl.float32, bitcast=True)


@triton.jit
def is_edited(records, slot, position):
    """Whether the slot has anything that changes logits at ``position``."""
    return position < integer(records, slot, EDITED_UNTIL)


@triton.jit
def load_logits(logits, edited, row, changed, ids, inside, STRIDE: tl.constexpr,
                EDITED: tl.constexpr):  # fmt: skip
    """float32 logits of the tokens ``ids`` where ``inside``, else -inf; NaN becomes +inf.

    They are those of ``edited`` [rows, STRIDE] float32 if the row is ``changed`` (1, else 0), else
    of ``logits`` [rows, STRIDE] of any type. EDITED: whether any row may be changed.
    """
    row = row.to(tl.int64)
    if EDITED:
        plain = inside & (tl.zeros_like(ids) == changed)
        x = tl.load(logits + row * STRIDE + ids, mask=plain, other=-INF).to(tl.float32)
        mine = inside & (tl.zeros_like(ids) != changed)
        y = tl.load(edited + row * STRIDE + ids, mask=mine, other=-INF)
        x = tl.where(tl.zeros_like(ids) != changed, y, x)
    else:
        x = tl.load(logits + row * STRIDE + ids, mask=inside, other=-INF).to(tl.float32)
    return tl.where(x == x, x, INF)


@triton.jit
def sortable(x):
    """int32 that order as float32 ``x`` does."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 becomes +0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mix64(z):
    """SplitMix64's finalizer of uint64."""
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    return z ^ (z >> 31)


@triton.jit
def noise_key(records, slot, position):
    """The key of the noise of (seed, position): uint64."""
    seed = tl.load((records + slot * WORDS + SEED).to(tl.pointer_type(tl.uint64)))
    return _mix64(_mix64(seed + GOLDEN) + (position.to(tl.uint64) + 1) * GOLDEN)


@triton.jit
def exponential(key, index):
    """Exp(1) noise in float64, number ``index`` of the stream of ``key``: that of
    ``workers.sampler``."""
    z = _mix64(key + (index.to(tl.uint64) + 1) * GOLDEN)
    uniform = ((z >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2 ** -52
    return -tl.log(uniform)
