"""bf16 matrix products by the compiled kernel of gemm.h."""

import torch
from torch import Tensor

from workers.kernels.build import library
from workers.kernels.memory import huge_tensor, result_tensor

PANEL = 32  # outputs that lie together in a packed weight


def has_gemm(dtype: torch.dtype, inputs: int) -> bool:
    """Whether ``PackedGemm`` takes weights of this type and number of inputs on this CPU."""
    if dtype != torch.bfloat16 or inputs % 2:
        return False
    kernels = library()
    return kernels is not None and kernels.has_gemm


class PackedGemm:
    """A weight [N, K] in bf16, packed for the kernel; the weight itself is not kept.

    No bit of a row's result depends on the other rows or on the number of threads.
    """

    def __init__(self, weight: Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        panels = -(-self.outputs // PANEL)
        self._packed = huge_tensor((panels, self.inputs * PANEL), torch.bfloat16)
        kernels = library()
        assert kernels is not None and weight.is_contiguous()
        self._kernel = kernels.gemm
        kernels.gemm_pack(
            weight.data_ptr(), self.outputs, self.inputs, self._packed.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip

    def __call__(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """relu?(x Wᵀ + bias) + residual for x [M, K], rounded to bf16 once. Returns [M, N]."""
        assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
        y = result_tensor((len(x), self.outputs), x.dtype)
        self._kernel(
            x.data_ptr(), x.stride(0), len(x), self._packed.data_ptr(), self.outputs, self.inputs,
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            relu, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y
