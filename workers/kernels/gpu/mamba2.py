"""The heads of Mamba-2 (arXiv 2405.21060), token by token: kernels/mamba2.py has the formulas.

A program takes SLICE of a head's columns, which do not meet, through all tokens of its row, as that
of the delta rule does (delta.py): its part of the state stays in registers, and one program text
serves steps of any kind. So no bit depends on how a sequence was cut into steps or on what shares
them. The next token's inputs are on their way meanwhile.

Decode is bound by the state, which is read and written once: 8 · heads · state_size · size bytes a
row. A prompt is bound by arithmetic, four operations for each element of the state and token, which
are not those of the matrix units, and by few programs where it is alone. The paper's chunked form
has them do it; delta.py says what that would take to keep the bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained
from workers.kernels.gpu.elementwise import softplus
from workers.kernels.gpu.states import part_of_state
from workers.kernels.mamba2 import Heads

SLICE = 16  # columns: of 128 rows 64 elements for each thread


@triton.jit
def _scan(
    xbc, times, times_stride, state, state_stride, starts, states, decay, dt, skip, y,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr,
    PS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """PS columns of a head and row each. Rows without tokens leave their state alone."""
    begin(CHAINED)
    head = tl.program_id(1)
    row = tl.program_id(2)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    if count > 0:
        slot = tl.load(states + row).to(tl.int64)
        n, p, rows, columns, at, mine = part_of_state(
            state, state_stride, slot, head, N, NP, P, PS
        )  # fmt: skip
        s = tl.load(at, mask=mine, other=0.0)
        rate, shift, through = tl.load(decay + head), tl.load(dt + head), tl.load(skip + head)
        width: tl.constexpr = HEADS * P + 2 * GROUPS * N
        x_at = head * P + p
        b_at = HEADS * P + head // (HEADS // GROUPS) * N + n
        xbc += start.to(tl.int64) * width
        times += start.to(tl.int64) * times_stride + head
        to = y + start.to(tl.int64) * (HEADS * P) + x_at
        x = tl.load(xbc + x_at, mask=columns, other=0.0)
        b = tl.load(xbc + b_at, mask=rows, other=0.0)
        c = tl.load(xbc + GROUPS * N + b_at, mask=rows, other=0.0)
        time = tl.load(times).to(tl.float32)
        for token in range(count):
            # The last one once more at the end, where there is none.
            on = (token + 1 < count).to(tl.int32)
            xbc += on * width
            times += on * times_stride
            next_x = tl.load(xbc + x_at, mask=columns, other=0.0)
            next_b = tl.load(xbc + b_at, mask=rows, other=0.0)
            next_c = tl.load(xbc + GROUPS * N + b_at, mask=rows, other=0.0)
            next_time = tl.load(times)
            time = softplus(time + shift)
            s = tl.fma(b[:, None], (time * x)[None, :], s * tl.exp(rate * time))
            tl.store(to, tl.sum(s * c[:, None], 0) + through * x, mask=columns)
            to += HEADS * P
            x, b, c, time = next_x, next_b, next_c, next_time.to(tl.float32)
        tl.store(at, s, mask=mine)


def recur(
    xbc: Tensor, times: Tensor, state: Tensor, heads: Heads, starts: Tensor, states: Tensor
) -> Tensor:
    """The heads' outputs of a step, Sᵀ C + D x, before gate and norm: [T, heads * size], float32.

    xbc is [T, all x, all B, all C], float32, after convolution and SiLU; ``times`` [T, heads] are
    their dt. ``state`` [states, heads * state_size * size], float32, goes on; row r has tokens
    ``starts[r] : starts[r + 1]`` (int32 [R + 1]) and the state ``states[r]``.
    """
    assert xbc.is_contiguous() and times.stride(1) == state.stride(1) == 1
    y = torch.empty(len(xbc), heads.count * heads.size, dtype=torch.float32, device=xbc.device)
    _scan[(triton.cdiv(heads.size, SLICE), heads.count, len(states))](
        xbc, times, times.stride(0), state, state.stride(0), starts, states, heads.decay, heads.dt,
        heads.skip, y, HEADS=heads.count, GROUPS=heads.groups, N=heads.state_size,
        NP=triton.next_power_of_2(heads.state_size), P=heads.size, PS=SLICE,
        # As the delta rule's.
        num_warps=1, enable_fp_fusion=False, **chained(xbc.device),
    )  # fmt: skip
    return y
