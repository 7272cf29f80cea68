"""Linear layers: whole, split by output (column) or by input (row) over a tensor-parallel group.

On a CPU the weight is packed once, for our own kernel or for oneDNN, and no bit of a row depends on
the other rows of its batch: in float32, which ``F.linear`` does not keep, and in bfloat16 on AVX512
(AMX cuts the sum according to the number of rows). Measured against ``F.linear``, two threads:
bf16 2 to 4 times as fast for up to 8 rows, 1.3 to 1.7 times for 32, equal from 512 on; fp32 1.7 to
4 times for up to 8 rows, 1.5 to 2 times for 32, 1.1 to 1.7 times from 512 on.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from workers import kernels
from workers.kernels.gemm import PackedGemm, has_gemm
from workers.kernels.gemm_codes import CodesGemm
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.quantization.codes import Coded
from workers.quantization.rounding import Rounder
from workers.weights import Parameter

Activation = Literal["none", "relu", "gelu"]
Gate = Literal["silu", "gelu_tanh"]

# oneDNN sums a single row of more inputs than this in another order than the same row among others
# (measured on AVX512-bf16). There two rows are computed for one, which takes as long: the weight is
# what is read.
LONELY_INPUTS = 1024


@dataclass(frozen=True)
class Part:
    """A checkpoint linear ``name`` with ``size`` outputs, of which this rank computes ``cut``, in
    the ``order`` given."""

    name: str
    size: int
    cut: slice
    order: Tensor | None = None

    @property
    def share(self) -> int:
        share: int = self.cut.stop - self.cut.start
        return share


def scaled(cut: slice, size: int) -> slice:
    """``cut`` of units, say heads, as one of the outputs that they are, ``size`` each."""
    return slice(cut.start * size, cut.stop * size)


def part_by_head(name: str, widths: list[int], heads: int, cut: slice) -> Part:
    """A linear whose outputs are one head's after the other's, each of several ``widths``: here all
    heads' outputs of the first width come first. ``cut`` is of the heads."""
    width = sum(widths)
    rows = torch.arange((cut.stop - cut.start) * width).view(-1, width)
    order = torch.cat([part.flatten() for part in rows.split_with_sizes(widths, 1)])
    return Part(name, heads * width, scaled(cut, width), order)


class Packed:
    """y = act(x Wᵀ + b), or x Wᵀ + b + residual: the product itself, whatever splits it.

    On a GPU it is the product alone, with Triton's kernel for bias and activation behind it;
    whoever asks for ``late_bias`` adds the bias itself, and the residual is the next norm's.

    ``rounder`` rounds x before it. ``ready`` is to be called once the weight [N, K] is filled;
    where it ``packs``, the weight is then packed and, unless ``keep``, the plain one is let go.
    """

    def __init__(
        self,
        weight: Tensor | Coded,
        bias: Tensor | None,
        activation: Activation = "none",
        late_bias: bool = False,
        rounder: Rounder | None = None,
    ) -> None:
        self.weight: Tensor | Coded | None = weight
        self._fused = kernels.has_triton(weight.device)
        # Triton's kernels of codes round on their own.
        self._rounder = None if self._fused and isinstance(weight, Coded) else rounder
        self.late_bias = bias if late_bias and self._fused else None
        self.bias = None if self.late_bias is not None else bias
        self.activation = activation
        self._gemm: PackedGemm | CodesGemm | None = None
        self._packed: Tensor | None = None
        self._never_alone = False
        on_cpu = weight.device.type == "cpu"
        self._has_gemm = on_cpu and activation != "gelu" and has_gemm(weight.dtype, weight.shape[1])
        self.packs = self._has_gemm or (on_cpu and onednn_packs(weight.dtype))
        if isinstance(weight, Coded):
            self.packs = on_cpu and weight.dtype == torch.bfloat16

    def ready(self, weight: Tensor | Coded | None, keep: bool = False) -> None:
        """Take ``weight``, which is the constructor's or, where it packs, one like it."""
        if not self.packs:
            return
        if isinstance(weight, Coded):
            self._gemm = CodesGemm(weight)
            self.weight = None
            return
        assert weight is not None
        if self._has_gemm:
            self._gemm = PackedGemm(weight.contiguous())
        else:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._never_alone = weight.shape[1] > LONELY_INPUTS
        if not keep:
            self.weight = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._multiply(x if self._rounder is None else self._rounder.values(x), residual)

    def _multiply(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._gemm is not None:
            y = self._gemm(x, self.bias, residual, self.activation == "relu")
            return F.gelu(y) if self.activation == "gelu" else y
        if self._packed is None:
            return self._plain(x, residual)
        if self._never_alone and len(x) == 1:
            x = x.expand(2, -1)
            return self._multiply(x, None if residual is None else residual.expand(2, -1))[:1]
        if residual is not None:
            return _pointwise_add(x, residual, self._packed, self.bias)
        return _pointwise(x, self._packed, self.bias, self.activation)

    def gated(self, x: Tensor, gate: Gate = "silu") -> Tensor:
        """gate(a) * b, where the outputs are a and b side by side."""
        if gate == "gelu_tanh":
            y = self(x)
            return kernels.gelu_mul(y if self.late_bias is None else y + self.late_bias)
        if self._fused and self.weight is not None:
            return kernels.gated_product(x, self.weight, self.late_bias)
        return kernels.silu_mul(self(x))

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        assert self.weight is not None
        if self._fused:
            y = kernels.product(x, self.weight)
            if self.bias is not None or self.activation != "none":
                y = kernels.bias_act(y, self.bias, self.activation)
            return y
        assert isinstance(self.weight, Tensor)  # codes are multiplied by Triton's kernels
        if residual is not None:
            if self.bias is not None:
                residual = residual + self.bias
            return torch.addmm(residual, x, self.weight.t())
        y = F.linear(x, self.weight, self.bias)
        if self.activation == "relu":
            return F.relu_(y)
        return F.gelu(y) if self.activation == "gelu" else y


# Scalars and algorithm are post-op arguments: gelu's algorithm "none" is the exact one.
def _pointwise(x: Tensor, packed: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, activation, [], "none")
    return y


def _pointwise_add(x: Tensor, residual: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    return y


@functools.cache
def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether torch's private oneDNN operators are here and right, tried on a small example."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((3, 24), (8, 24), (8,), (3, 8))
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        got = {
            "relu": (_pointwise(x, packed, bias, "relu"), F.relu(expected)),
            "gelu": (_pointwise(x, packed, bias, "gelu"), F.gelu(expected)),
            "none": (_pointwise(x, packed, None, "none"), expected - bias),
            "add": (_pointwise_add(x, residual, packed, bias), expected + residual),
        }
    except (AttributeError, RuntimeError, TypeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 1e-1
    return all(torch.allclose(y.double(), z, tolerance, tolerance) for y, z in got.values())


class ColumnLinear:
    """One or several checkpoint linears of the same input, merged; this rank has its outputs.

    Called with x [T, K] it gives [T, the shares of the parts side by side]. With ``late_bias``
    whoever takes that adds ``self.late_bias``, if there is one.
    """

    def __init__(
        self,
        place: Place,
        parts: list[Part],
        inputs: int,
        bias: bool,
        activation: Activation = "none",
        late_bias: bool = False,
    ) -> None:
        outputs = sum(part.share for part in parts)
        names = [part.name for part in parts]
        rounder = place.rounder(names)
        weight = place.weight(names, outputs, inputs, rounder=rounder)
        biases = torch.empty(outputs, dtype=place.dtype, device=place.device) if bias else None
        self._product = product = Packed(weight, biases, activation, late_bias, rounder)
        self._unfilled = len(parts)
        self._parameters: list[Parameter] = []
        alone = len(parts) == 1
        at = 0
        for part in parts:
            rows = slice(at, at + part.share)
            at += part.share
            cut = (part.cut, slice(None))
            filling = Parameter(
                f"{part.name}.weight",
                (part.size, inputs),
                weight[rows],
                cut,
                product.ready if alone else self._filled,
                adopt=alone and product.packs,
                order=part.order,
            )
            self._parameters += place.stored(filling, rounder)
            if biases is not None:
                self._parameters.append(
                    Parameter(
                        f"{part.name}.bias", (part.size,), biases[rows], cut[:1], order=part.order
                    )
                )

    def _filled(self, _: Tensor) -> None:
        self._unfilled -= 1
        if not self._unfilled:
            self._product.ready(self._product.weight)

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    @property
    def late_bias(self) -> Tensor | None:
        return self._product.late_bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    def gated(self, x: Tensor, gate: Gate = "silu") -> Tensor:
        """gate(a) * b [T, N / 2], where the two parts are a and b."""
        return self._product.gated(x, gate)


class RowLinear:
    """A checkpoint linear split by its inputs: x [T, this rank's share] to an update [T, N] of the
    residual stream.

    On a CPU bias and residual are added on rank 0 only, inside its product, and so reach the sum
    once; on a GPU the next norm adds them, on every rank.
    """

    def __init__(self, place: Place, name: str, inputs: int, outputs: int, bias: bool) -> None:
        group = place.group
        self._group = group
        cut = group.split(inputs, f"the inputs of {name}")
        rounder = place.rounder([name], cut)
        weight = place.weight([name], outputs, inputs, cut, rounder=rounder)
        self._late = kernels.has_triton(place.device)
        held = outputs if group.rank == 0 or self._late else 0
        biases = torch.empty(held, dtype=place.dtype, device=place.device)
        product = Packed(weight, biases if bias and held else None, "none", True, rounder)
        self._product = product
        shape = (outputs, inputs)
        both = (slice(None), cut)
        self._parameters = place.stored(
            Parameter(f"{name}.weight", shape, weight, both, product.ready, product.packs), rounder
        )
        if bias:
            self._parameters.append(Parameter(f"{name}.bias", shape[:1], biases, (slice(0, held),)))

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        if self._late:
            update = self._group.all_reduce(self._product(x))
            return Stream(residual, update, self._product.late_bias)
        y = self._product(x, residual if self._group.rank == 0 else None)
        return Stream(self._group.all_reduce(y))

    def update(self, x: Tensor) -> Tensor:
        """The update [T, N] alone, with its bias, for what does not add it as it is."""
        y = self._group.all_reduce(self.share(x))
        bias = self._product.late_bias
        return y if bias is None else y + bias

    def share(self, x: Tensor) -> Tensor:
        """What this rank adds to the sum over the group [T, N]."""
        return self._product(x)


class ReplicatedLinear(ColumnLinear):
    """A small linear that every rank computes whole."""

    def __init__(
        self,
        place: Place,
        name: str,
        inputs: int,
        outputs: int,
        bias: bool = False,
        late_bias: bool = False,
    ) -> None:
        part = Part(name, outputs, slice(0, outputs))
        super().__init__(place, [part], inputs, bias, late_bias=late_bias)
