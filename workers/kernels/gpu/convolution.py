"""Causal convolutions behind a state, each channel's own, with SiLU: in front of delta nets and of
Mamba-2.

A row's program goes through its tokens in order and moves the state on at its end, so nobody else
reads what it writes. Bound by memory: inputs are read from the caches once for each tap.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.gpu.chain import begin, chained

PER_PROGRAM = 64  # channels


@triton.jit
def _input(x, x_stride, line, at, channel, there, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """A row's inputs at tokens ``at`` of this step, or before it: those are in ``line``."""
    now = tl.load(x + at.to(tl.int64) * x_stride + channel, mask=there & (at >= 0), other=0.0)
    past = line + (TAPS - 1 + at) * CHANNELS + channel
    return tl.where(at >= 0, now.to(tl.float32), tl.load(past, mask=there & (at < 0), other=0.0))


@triton.jit
def _convolve(
    x, x_stride, weight, bias, past, past_stride, starts, states, y, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, PAST: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    BIAS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """C channels of a row each, T tokens at a time. Rows without tokens leave their state alone.
    PAST is a power of two, at least TAPS - 1."""
    begin(CHAINED)
    row = tl.program_id(0)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    if count > 0:
        channel = tl.program_id(1) * C + tl.arange(0, C)
        there = channel < CHANNELS
        line = past + tl.load(states + row).to(tl.int64) * past_stride
        x += start.to(tl.int64) * x_stride
        y += start.to(tl.int64) * CHANNELS
        for first in range(0, count, T):
            token = (first + tl.arange(0, T))[:, None]
            inside = (token < count) & there[None, :]
            value = tl.zeros([T, C], tl.float32)
            for tap in tl.static_range(TAPS):
                factor = tl.load(weight + channel * TAPS + TAPS - 1 - tap, mask=there, other=0.0)
                value += factor[None, :] * _input(
                    x, x_stride, line, token - tap, channel[None, :], inside, TAPS, CHANNELS
                )
            if BIAS:
                value += tl.load(bias + channel, mask=there, other=0.0)[None, :]
            value = value / (1.0 + tl.exp(-value))
            tl.store(y + token.to(tl.int64) * CHANNELS + channel[None, :], value, mask=inside)
        i = tl.arange(0, PAST)[:, None]
        moved = (i < TAPS - 1) & there[None, :]
        last = _input(
            x, x_stride, line, count - (TAPS - 1) + i, channel[None, :], moved, TAPS, CHANNELS
        )
        tl.debug_barrier()  # all threads have read what is overwritten
        tl.store(line + i * CHANNELS + channel[None, :], last, mask=moved)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, starts: Tensor, states: Tensor
) -> Tensor:
    """silu of the convolutions of x [T, channels] with ``weight`` [channels, taps] + ``bias``
    [channels], both float32.

    Row r has tokens ``starts[r] : starts[r + 1]`` (int32 [R + 1]); its last taps - 1 inputs before
    them are in ``past[states[r]]``, of [states, taps - 1, channels] in float32, which goes on.
    """
    (tokens, channels), taps, rows = x.shape, weight.shape[1], len(states)
    y = torch.empty(tokens, channels, dtype=torch.float32, device=x.device)
    prompts = tokens > rows
    _convolve[(rows, triton.cdiv(channels, PER_PROGRAM))](
        x, x.stride(0), weight, bias, past, past.stride(0), starts, states, y, CHANNELS=channels,
        TAPS=taps, PAST=triton.next_power_of_2(taps - 1), T=32 if prompts else 1, C=PER_PROGRAM,
        BIAS=bias is not None, num_warps=4 if prompts else 1,
        # The same roundings whatever the tile.
        enable_fp_fusion=False, **chained(x.device),
    )  # fmt: skip
    return y
