"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel of ours lets the next one start at once, and waits for the one before it before it touches
anything that this one may have written or may still read. So its programs are in place, and with
them whatever they could do before, when their turn comes; that hides a launch's two to three
microseconds. Hopper has it; elsewhere, and in Triton's interpreter, kernels just follow each other.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def begin(CHAINED: tl.constexpr):
    """What a kernel does first."""
    if CHAINED:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def let_next_start(CHAINED: tl.constexpr):
    """The first half of ``begin``, for kernels that have something to do before the second."""
    if CHAINED:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):
    """The second half of ``begin``."""
    if CHAINED:
        cuda.gdc_wait()


@functools.cache
def chained(device: torch.device) -> dict[str, bool]:
    """The arguments of a launch on ``device``, for a kernel with ``CHAINED``."""
    there = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    if not there or os.environ.get("TRITON_INTERPRET") == "1":
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}
