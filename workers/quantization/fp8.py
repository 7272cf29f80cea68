"""Weights in 8-bit floats (E4M3) with scales of blocks, outputs or the whole: ``quant_method: fp8``
as DeepSeek and Qwen publish it, and made of other weights while they are loaded.

Inputs are E4M3 too, as ``activation_scheme`` says: with a scale of each token or, where weights
have blocks, of as many inputs as those have. vLLM takes the same scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.checkpoint import Config
from workers.quantization.codes import Codes, Grouping, Kind
from workers.quantization.names import HEADS, is_plain, skipped
from workers.quantization.quantization import Quantization
from workers.quantization.rounding import INPUT_SCALE, LARGEST, Rounding
from workers.quantization.stored import Part, Stored
from workers.weights import FLOATS

E4M3 = (torch.float8_e4m3fn,)
SCALES = (*FLOATS, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Scaled:
    """A tensor ``weight`` of 8-bit codes with the scales ``leaf`` of its blocks [outputs, inputs],
    None being all of them; of the whole there is one number. Integers are around 0."""

    leaf: str
    block: tuple[int | None, int | None]
    kind: Kind = Kind.E4M3
    has_zeros: bool = False
    scale_dtype: torch.dtype = torch.float32
    rounding: Rounding | None = None

    @property
    def height(self) -> int:
        return self.block[0] or 1

    def grouping(self, part: Part) -> Grouping:
        return part.grouping(self.block[1])[1]

    def tensors(self, part: Part) -> list[Stored]:
        dtypes = E4M3 if self.kind is Kind.E4M3 else (torch.int8,)
        weight = Stored("weight", part.shape, (part.rows, part.columns), dtypes)
        if self.block == (None, None):
            return [weight, Stored(self.leaf, (), dtypes=SCALES)]
        sizes = [size or whole for size, whole in zip(self.block, part.shape, strict=True)]
        counts = [-(-whole // size) for size, whole in zip(sizes, part.shape, strict=True)]
        rows = slice(part.rows.start // sizes[0], -(-part.rows.stop // sizes[0]))
        cut = (rows, part.grouping(self.block[1])[0])
        return [weight, Stored(self.leaf, (counts[0], counts[1]), cut, SCALES)]

    def decode(self, part: Part, tensors: dict[str, Tensor]) -> Codes:
        codes, scales = tensors["weight"], tensors[self.leaf].float()
        if self.kind is Kind.INT8:
            codes = (codes.short() + self.kind.middle).to(torch.uint8)
        height = self.block[0] or part.shape[0]
        rows = torch.arange(part.rows.start, part.rows.stop, device=codes.device) // height
        if scales.numel() == 1:
            scales = scales.reshape(1, 1)
        scales = scales[rows - part.rows.start // height]
        return Codes(self.kind, codes.view(torch.uint8), scales, self.grouping(part))


@dataclass(frozen=True)
class OnTheFly:
    """A weight of 16 or 32 bits that becomes E4M3 with a scale for each output."""

    kind: Kind = Kind.E4M3
    has_zeros: bool = False
    scale_dtype: torch.dtype = torch.float32
    height: int = 1
    rounding: Rounding | None = Rounding()

    def grouping(self, part: Part) -> Grouping:
        return part.grouping(None)[1]

    def tensors(self, part: Part) -> list[Stored]:
        # All inputs, so that the scale is the same however they are cut.
        return [Stored("weight", part.shape, (part.rows, slice(None)))]

    def decode(self, part: Part, tensors: dict[str, Tensor]) -> Codes:
        weight = tensors["weight"].float()
        scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
        codes = (weight / scales).clamp(-LARGEST, LARGEST)[:, part.columns].to(E4M3[0])
        return Codes(self.kind, codes.view(torch.uint8), scales, self.grouping(part))


def read_fp8(config: Config) -> Quantization:
    """Of ``quant_method: fp8``. Raises CheckpointError, naming the field."""
    scheme = config.choice("activation_scheme", "dynamic", ("dynamic", "static"))
    config.choice("fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    powers = config.choice("scale_fmt", "float", ("float", "ue8m0")) == "ue8m0"
    config.choice("expert_dtype", "fp8", ("fp8",))
    if config.get("modules_to_convert"):
        raise config.error("modules_to_convert", "is not supported: linears alone are quantized")
    static = scheme == "static"
    skips = skipped(config, "modules_to_not_convert", "ignored_layers")
    block = config.get("weight_block_size")
    if not config.boolean("is_checkpoint_fp8_serialized", True):
        format: Scaled | OnTheFly = OnTheFly()
        what = "fp8 made of other weights, a scale for each output"
    elif block is None:
        format = Scaled("weight_scale_inv", (None, None), rounding=Rounding(static=static))
        what = "fp8, a scale for each tensor"
    else:
        block = read_block(config, "weight_block_size")
        rounding = Rounding(static=True) if static else Rounding(block[1], powers)
        format = Scaled("weight_scale_inv", block, rounding=rounding)
        what = f"fp8 in blocks of {block[0]} × {block[1]}"

    def format_of(name: str) -> Scaled | OnTheFly | None:
        return None if name in HEADS or is_plain(name) or skips(name) else format

    assert format.rounding is not None
    return Quantization(
        f"{what}, {format.rounding.in_words()}",
        format_of,
        renamed={"weight_scale": "weight_scale_inv", "activation_scale": INPUT_SCALE},
        beside=frozenset({"k_scale", "v_scale", "kv_scale"}),
    )


def read_block(config: Config, key: str) -> tuple[int, int]:
    """Outputs and inputs of a block. Raises CheckpointError."""
    block = config.get(key)
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise config.error(key, "must be two positive integers, outputs and inputs of a block")
    return sizes[0], sizes[1]
