"""bf16 matrix products with weights in codes of 4 bits, by the compiled kernel of codes.h."""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.build import library
from workers.kernels.gemm import PANEL, has_gemm
from workers.kernels.memory import huge_tensor, result_tensor
from workers.quantization.codes import Coded, Grouping, Kind

# What a code means where its offset is added: code - zero at 15 - zero + code, or E2M1's values.
_INTEGERS = [float(i - 15) for i in range(32)]
_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
_NUMBERS = {Kind.INT4: _INTEGERS, Kind.E2M1: [*_E2M1, *(-value for value in _E2M1), *[0.0] * 16]}


def has_gemm_codes(kind: Kind, grouping: Grouping, dtype: torch.dtype) -> bool:
    """Whether ``CodesGemm`` takes such weights on this CPU: in groups of pairs of inputs."""
    pairs = grouping.of is None and grouping.size % 2 == 0 and grouping.offset % 2 == 0
    return kind in _NUMBERS and pairs and has_gemm(dtype, 2)


class CodesGemm:
    """A weight [N, K] in codes, packed for the kernel; the weight itself is not kept.

    No bit of a row's result depends on the other rows or on the number of threads.
    """

    def __init__(self, weight: Coded) -> None:
        part = weight.unpacked()
        self.outputs, self.inputs = weight.shape
        groups, grouping = part.scales.shape[1], part.grouping
        missing = -self.outputs % PANEL
        panels = (self.outputs + missing) // PANEL
        codes = F.pad(part.codes, (0, 0, 0, missing))
        pairs = codes.view(panels, 2, PANEL // 2, -1, 2).permute(0, 3, 1, 2, 4).flatten(3)
        self._codes = huge_tensor((panels, pairs.shape[1], PANEL), torch.uint8)
        self._codes.copy_(pairs[:, :, 0] | pairs[:, :, 1] << 4)
        scales = F.pad(part.scales, (0, 0, 0, missing))
        self._scales = scales.view(panels, PANEL, groups).transpose(1, 2).contiguous()
        offsets = torch.zeros_like(scales, dtype=torch.uint8)
        if part.kind is Kind.INT4:
            offsets[: self.outputs] = 15 - (part.kind.middle if part.zeros is None else part.zeros)
        offsets = offsets.view(panels, PANEL, groups).transpose(1, 2)
        self._offsets = offsets.repeat_interleave(2, -1)  # both inputs of a pair
        self._numbers = torch.tensor(_NUMBERS[part.kind]).bfloat16()
        self._groups = grouping.size, grouping.offset, groups
        kernels = library()
        assert kernels is not None and self.inputs % 2 == 0
        self._kernel = kernels.gemm_codes

    def __call__(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """relu?(x Wᵀ + bias) + residual for x [M, K], rounded to bf16 once. Returns [M, N]."""
        assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
        y = result_tensor((len(x), self.outputs), x.dtype)
        self._kernel(
            x.data_ptr(), x.stride(0), len(x), self._codes.data_ptr(), self._offsets.data_ptr(),
            self._scales.data_ptr(), self._numbers.data_ptr(), *self._groups, self.outputs,
            self.inputs, None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            relu, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y
