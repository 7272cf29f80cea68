"""The heads of Mamba-2 (arXiv 2405.21060): by the kernel of mamba2.h, else in PyTorch.

x, B and C are the silu of their inputs; a group of heads shares B and C [state_size]. A head's
state S [state_size, size] goes on with each token:

    S = exp(-exp(A) · t) · S + B ⊗ t x    t = softplus(dt + bias), the token's time step
    y = Sᵀ C + D x

and the result is rms_norm(y · silu(z)), over all heads of a group together.
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


@dataclass(frozen=True)
class Heads:
    """A rank's heads, in groups of as many each; and their parameters, float32.

    ``decay`` (-exp(A)), ``dt`` and ``skip`` (D) are [heads], ``norm`` is [heads * size].
    """

    groups: int
    count: int
    size: int
    state_size: int
    decay: Tensor
    dt: Tensor
    skip: Tensor
    norm: Tensor
    eps: float


class Mamba2Step(ctypes.Structure):
    """``Mamba2Step`` of mamba2.h."""

    _fields_ = [
        ("rows", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("state_size", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("state_stride", ctypes.c_int64),
        ("rest_stride", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("decay", ctypes.c_void_p),
        ("dt", ctypes.c_void_p),
        ("skip", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
    ]


def recur(xbc: Tensor, rest: Tensor, state: Tensor, heads: Heads, sweep: Sweep) -> Tensor:
    """The outputs [T, heads * size] of a step, float32.

    xbc is [T, all x, all B, all C], ``rest`` [T, all z, all dt], both float32; ``state`` [states,
    heads * state_size * size], float32, goes on.
    """
    kernels = library() if xbc.is_cpu else None
    if kernels is None:
        return _plain(xbc, rest, state, heads, sweep.turns)
    assert xbc.is_contiguous() and rest.stride(1) == state.stride(1) == 1
    step = Mamba2Step(
        len(sweep.states), heads.groups, heads.count // heads.groups, heads.size,
        heads.state_size, heads.eps, state.stride(0), rest.stride(0), sweep.starts.data_ptr(),
        sweep.states.data_ptr(), heads.decay.data_ptr(), heads.dt.data_ptr(),
        heads.skip.data_ptr(), heads.norm.data_ptr(),
    )  # fmt: skip
    y = result_tensor((len(xbc), heads.count * heads.size), torch.float32)
    kernels.mamba2(
        ctypes.byref(step), xbc.data_ptr(), rest.data_ptr(), state.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _plain(xbc: Tensor, rest: Tensor, state: Tensor, heads: Heads, turns: Turns) -> Tensor:
    """The same in PyTorch, whose exp of an element may depend on where in a tensor it is."""
    inner, shared = heads.count * heads.size, heads.groups * heads.state_size
    x, *both = F.silu(xbc)[turns.order].split_with_sizes([inner, shared, shared], 1)
    z, dt = rest[turns.order].split_with_sizes([inner, heads.count], 1)
    x = x.reshape(len(x), heads.count, -1)
    b, c = (
        part.reshape(len(x), heads.groups, -1).repeat_interleave(heads.count // heads.groups, 1)
        for part in both
    )
    time = F.softplus(dt + heads.dt)
    decay, fresh = (heads.decay * time).exp()[..., None, None], time[..., None] * x
    found = torch.empty_like(x)
    all_rows = state[turns.states].view(-1, heads.count, heads.state_size, heads.size)
    for turn in turns.spans:
        s = all_rows[: turn.stop - turn.start]
        s *= decay[turn]
        s += b[turn][..., None] * fresh[turn][:, :, None]
        found[turn] = (s * c[turn][..., None]).sum(2)
    state[turns.states] = all_rows.flatten(1)
    gated = (found + heads.skip[:, None] * x).flatten(1) * F.silu(z)
    gated = gated.view(len(x), heads.groups, -1)
    y = torch.empty_like(z)
    y[turns.order] = plain.rms_norm(gated, heads.norm.view(heads.groups, -1), heads.eps).flatten(1)
    return y
