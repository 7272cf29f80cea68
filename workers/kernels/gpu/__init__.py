"""Kernels of our own for NVIDIA GPUs, in Triton: a file each.

None of them looks at a value on the host, so that a step can be captured in a CUDA graph. A row's
result never depends on the other rows of its step, not in one bit. Their arithmetic is checked
without a GPU by Triton's interpreter (tests/unit/test_gpu_*.py).
"""

from workers.kernels.gpu import (
    attention,
    convolution,
    delta,
    elementwise,
    heads,
    mamba2,
    norm,
    product,
    rows,
)

__all__ = [
    "attention",
    "convolution",
    "delta",
    "elementwise",
    "heads",
    "mamba2",
    "norm",
    "product",
    "rows",
]
