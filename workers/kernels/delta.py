"""The heads of a gated delta net (arXiv 2412.06464): by the kernel of delta.h, else in PyTorch.

q, k and v are the silu of their inputs; q and k have length 1, and q is divided by √key_size. A
head's state S [key_size, value_size] goes on with each token:

    S = g · S                    g = exp(-exp(A) · softplus(a + dt)), the token's decay
    S = S + k ⊗ β (v - Sᵀ k)     β = sigmoid(b), how much of what k stands for is replaced
    y = rms_norm(Sᵀ q) · silu(z)
"""

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels import plain
from workers.kernels.build import library
from workers.kernels.memory import result_tensor
from workers.sweep import Sweep, Turns

L2_EPS = 1e-6


@dataclass(frozen=True)
class Heads:
    """A rank's heads: of keys, each for as many heads of values; and their parameters, float32.

    ``decay`` (-exp(A)) and ``dt`` are [values], ``norm`` is [value_size].
    """

    keys: int
    values: int
    key_size: int
    value_size: int
    decay: Tensor
    dt: Tensor
    norm: Tensor
    eps: float


class DeltaStep(ctypes.Structure):
    """``DeltaStep`` of delta.h."""

    _fields_ = [
        ("rows", ctypes.c_int32),
        ("keys", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("key_size", ctypes.c_int32),
        ("value_size", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("state_stride", ctypes.c_int64),
        ("rest_stride", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("decay", ctypes.c_void_p),
        ("dt", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
    ]


def recur(qkv: Tensor, rest: Tensor, state: Tensor, heads: Heads, sweep: Sweep) -> Tensor:
    """The outputs [T, values * value_size] of a step, float32.

    qkv is [T, all q, all k, all v], ``rest`` [T, all z, all b, all a], both float32; ``state``
    [states, values * key_size * value_size], float32, goes on.
    """
    kernels = library() if qkv.is_cpu else None
    if kernels is None:
        return _plain(qkv, rest, state, heads, sweep.turns)
    assert qkv.is_contiguous() and rest.stride(1) == state.stride(1) == 1
    step = DeltaStep(
        len(sweep.states), heads.keys, heads.values // heads.keys, heads.key_size,
        heads.value_size, heads.eps, state.stride(0), rest.stride(0), sweep.starts.data_ptr(),
        sweep.states.data_ptr(), heads.decay.data_ptr(), heads.dt.data_ptr(),
        heads.norm.data_ptr(),
    )  # fmt: skip
    y = result_tensor((len(qkv), heads.values * heads.value_size), torch.float32)
    kernels.delta(
        ctypes.byref(step), qkv.data_ptr(), rest.data_ptr(), state.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _plain(qkv: Tensor, rest: Tensor, state: Tensor, heads: Heads, turns: Turns) -> Tensor:
    """The same in PyTorch, whose exp of an element may depend on where in a tensor it is."""
    key, value = heads.keys * heads.key_size, heads.values * heads.value_size
    q, k, v = F.silu(qkv)[turns.order].split_with_sizes([key, key, value], 1)
    z, b, a = rest[turns.order].split_with_sizes([value, heads.values, heads.values], 1)
    q, k = (_unit(x.reshape(len(x), heads.keys, -1), heads)[..., None] for x in (q, k))
    q = q * heads.key_size**-0.5
    v = v.reshape(len(v), heads.values, -1)
    decay = (heads.decay * F.softplus(a + heads.dt)).exp()[..., None, None]
    beta = b.sigmoid()[..., None]
    found = torch.empty_like(v)
    all_rows = state[turns.states].view(-1, heads.values, heads.key_size, heads.value_size)
    for turn in turns.spans:
        s = all_rows[: turn.stop - turn.start]
        s *= decay[turn]
        change = (v[turn] - (s * k[turn]).sum(2)) * beta[turn]
        s += k[turn] * change[:, :, None]
        found[turn] = (s * q[turn]).sum(2)
    state[turns.states] = all_rows.flatten(1)
    y = torch.empty_like(v)
    y[turns.order] = plain.rms_norm(found, heads.norm, heads.eps) * F.silu(z).view_as(found)
    return y.flatten(1)


def _unit(x: Tensor, heads: Heads) -> Tensor:
    """x [T, keys, key_size] at length 1, once for each head of values."""
    x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)
    return x.repeat_interleave(heads.values // heads.keys, 1)
