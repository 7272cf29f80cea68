"""The gated delta rule (arXiv 2412.06464), token by token: kernels/delta.py has the formulas.

A program takes SLICE of a head's columns, which do not meet, through all tokens of its row. Its
part of the state stays in registers, and there is one program text for steps of any kind: so no bit
depends on how a sequence was cut into steps or on what shares them. To shorten the way from a token
to the next, both sums over the state are of what the token before left, side by side:

    y = (g S + k ⊗ change)ᵀ q = g · Sᵀ q + (k · q) · change        change = β (v - g · Sᵀ k)

and the lengths of q and k are factors of the sums. The next token's inputs are on their way
meanwhile.

Decode is bound by the state, which is read and written once: 8 · values · key_size · value_size
bytes a row. A prompt is bound by the time from token to token (some hundred cycles), for a row has
few programs. A chunked form (products of the matrix units over 64 tokens, as the paper has it)
would be faster there. To keep the bits it would have to cut every sequence at the same positions,
multiples of 64 from its first token, and to compute a token in the same way whether its chunk came
at once or token by token: from the state at the chunk's beginning, which would have to be kept,
beside the chunk's inputs so far, until the chunk is whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.delta import L2_EPS, Heads
from workers.kernels.gpu.chain import begin, chained
from workers.kernels.gpu.elementwise import softplus
from workers.kernels.gpu.states import part_of_state

SLICE = 16  # columns: of 128 keys 64 elements for each thread
_L2_EPS = tl.constexpr(L2_EPS)


@triton.jit
def _delta(
    qkv, gates, gates_stride, state, state_stride, starts, states, decay, dt, y,
    KEYS: tl.constexpr, VALUES: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr,
    VS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """VS columns of a head and row each. Rows without tokens leave their state alone."""
    begin(CHAINED)
    head = tl.program_id(1)
    row = tl.program_id(2)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    if count > 0:
        slot = tl.load(states + row).to(tl.int64)
        k, v, rows, columns, at, mine = part_of_state(
            state, state_stride, slot, head, K, KP, V, VS
        )  # fmt: skip
        s = tl.load(at, mask=mine, other=0.0)
        rate, shift = tl.load(decay + head), tl.load(dt + head)
        width: tl.constexpr = 2 * KEYS * K + VALUES * V
        query_at = head // (VALUES // KEYS) * K + k
        value_at = 2 * KEYS * K + head * V + v
        qkv += start.to(tl.int64) * width
        gates += start.to(tl.int64) * gates_stride + head
        to = y + start.to(tl.int64) * (VALUES * V) + head * V + v
        query = tl.load(qkv + query_at, mask=rows, other=0.0)
        key = tl.load(qkv + KEYS * K + query_at, mask=rows, other=0.0)
        value = tl.load(qkv + value_at, mask=columns, other=0.0)
        b, a = tl.load(gates).to(tl.float32), tl.load(gates + VALUES).to(tl.float32)
        for token in range(count):
            # The last one once more at the end, where there is none.
            on = (token + 1 < count).to(tl.int32)
            qkv += on * width
            gates += on * gates_stride
            next_query = tl.load(qkv + query_at, mask=rows, other=0.0)
            next_key = tl.load(qkv + KEYS * K + query_at, mask=rows, other=0.0)
            next_value = tl.load(qkv + value_at, mask=columns, other=0.0)
            next_b, next_a = tl.load(gates), tl.load(gates + VALUES)
            key_factor = tl.rsqrt(tl.sum(key * key, 0) + _L2_EPS)
            query_factor = tl.rsqrt(tl.sum(query * query, 0) + _L2_EPS) * (K**-0.5)
            both = tl.sum(key * query, 0) * key_factor
            beta = 1.0 / (1.0 + tl.exp(-b))
            g = tl.exp(rate * softplus(a + shift))
            found = tl.sum(s * key[:, None], 0) * (g * key_factor)
            answer = tl.sum(s * query[:, None], 0) * g
            change = (value - found) * beta
            s = tl.fma(key[:, None], (change * key_factor)[None, :], s * g)
            tl.store(to, (answer + both * change) * query_factor, mask=columns)
            to += VALUES * V
            query, key, value = next_query, next_key, next_value
            b, a = next_b.to(tl.float32), next_a.to(tl.float32)
        tl.store(at, s, mask=mine)


def recur(
    qkv: Tensor, gates: Tensor, state: Tensor, heads: Heads, starts: Tensor, states: Tensor
) -> Tensor:
    """What a step's tokens find in the states, [T, values, value_size] in float32.

    qkv is [T, all q, all k, all v], float32, after convolution and SiLU; ``gates`` [T, all b, all
    a]. ``state`` [states, values * key_size * value_size], float32, goes on; row r has tokens
    ``starts[r] : starts[r + 1]`` (int32 [R + 1]) and the state ``states[r]``.
    """
    assert qkv.is_contiguous() and gates.stride(1) == state.stride(1) == 1
    y = torch.empty(
        len(qkv), heads.values, heads.value_size, dtype=torch.float32, device=qkv.device
    )
    _delta[(triton.cdiv(heads.value_size, SLICE), heads.values, len(states))](
        qkv, gates, gates.stride(0), state, state.stride(0), starts, states, heads.decay, heads.dt,
        y, KEYS=heads.keys, VALUES=heads.values, K=heads.key_size,
        KP=triton.next_power_of_2(heads.key_size), V=heads.value_size, VS=SLICE,
        # A warp each: sums need no other's part. No product and sum become one instruction in one
        # copy of the loop and not in another.
        num_warps=1, enable_fp_fusion=False, **chained(qkv.device),
    )  # fmt: skip
    return y
