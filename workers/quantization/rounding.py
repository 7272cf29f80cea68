"""Inputs of linears, rounded to E4M3 as their checkpoint says: what goes into a product is
code · scale, and code = x / scale, at most 448.

A token's scales are its own (or the checkpoint's), so no token depends on the others of its batch.
vLLM and DeepSeek (arXiv 2412.19437, section 3.3) take the same scales: the largest value of a
token, or of a group of its inputs, becomes 448.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.weights import Parameter

LARGEST = 448.0  # of E4M3
LEAST = 1e-10  # that the largest value counts as
INPUT_SCALE = "input_scale"  # the tensor of a static scale


@dataclass(frozen=True)
class Rounding:
    """Which inputs of a token share a scale: ``group`` of them, or all (None). ``powers``: scales
    are powers of two, the next ones up. ``static``: there is one for all tokens, in the
    checkpoint."""

    group: int | None = None
    powers: bool = False
    static: bool = False

    def in_words(self) -> str:
        """For people."""
        if self.static:
            return "activations in fp8, with scales of the checkpoint"
        if self.group is None:
            return "activations in fp8, a scale for each token"
        return f"activations in fp8, in groups of {self.group}"


class Rounder:
    """The rounding of what goes into some linears together. This rank has a part of the inputs,
    which begins ``offset`` behind the beginning of a group; the rest of them counts for no scale.

    ``scale`` is the static one, float32: the largest of the linears'.
    """

    def __init__(self, rounding: Rounding, device: torch.device, offset: int = 0) -> None:
        self.rounding, self.offset = rounding, offset
        self.scale: Tensor | None = None
        if rounding.static:
            self.scale = torch.zeros((), dtype=torch.float32, device=device)

    def learn(self, scale: Tensor) -> None:
        """Take over the static scale of one of the linears, whose sign means nothing."""
        assert self.scale is not None
        torch.maximum(self.scale, scale.abs().max(), out=self.scale)

    def groups(self, inputs: int) -> int:
        """How many scales a token has."""
        group = self.rounding.group
        return 1 if group is None or self.rounding.static else -(-(inputs + self.offset) // group)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, K] as codes [T, K] and scales [T, groups], float32."""
        tokens, inputs = x.shape
        count = self.groups(inputs)
        size, offset = (inputs, 0) if count == 1 else (self.rounding.group or 0, self.offset)
        padding = (offset, count * size - offset - inputs)
        wide = F.pad(x.float(), padding).view(tokens, count, size)
        if self.scale is None:
            scales = wide.abs().amax(-1).clamp(min=LEAST) / LARGEST
            if self.rounding.powers:
                scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        else:
            scales = self.scale.expand(tokens, 1)
        codes = (wide / scales[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return codes.flatten(1)[:, offset : offset + inputs], scales

    def values(self, x: Tensor) -> Tensor:
        """The rounded x [T, K], in its type."""
        codes, scales = self.codes(x)
        if scales.shape[1] > 1:
            group = self.rounding.group or 0
            at = (torch.arange(x.shape[1], device=x.device) + self.offset) // group
            scales = scales[:, at]
        return (codes.float() * scales).to(x.dtype)


class InputScale(Parameter):
    """The static scale of linear ``name``, for the rounder of its inputs."""

    def __init__(self, name: str, device: torch.device, rounder: Rounder | None) -> None:
        def learn(scale: Tensor) -> None:
            if rounder is not None:
                rounder.learn(scale)

        target = torch.empty(1, dtype=torch.float32, device=device)
        super().__init__(f"{name}.{INPUT_SCALE}", (), target, filled=learn)

    @property
    def count(self) -> int:
        return 0
