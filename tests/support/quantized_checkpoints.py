"""Checkpoints in the published formats of quantized weights, written as those formats' tools do.

Each format makes of a weight [N, K] what the checkpoint stores, by the last part of its name, and
the weight that this stands for, in float32.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Quantized = tuple[dict[str, Tensor], Tensor]


def words(values: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Values [R, n] packed along n into int32 [R, ⌈n · bits / 32⌉], the first in the lowest bits,
    or in each word those at ``order``."""
    each = 32 // bits
    values = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % each))
    packed = torch.zeros(len(values), values.shape[1] // each, dtype=torch.int64)
    for i in range(each):
        packed |= values[:, (order[i] if order else i) :: each] << (bits * i)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def integers(
    weight: Tensor, bits: int, groups: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], zeros and scales [N, G] of columns in ``groups`` [K], and what they stand for.
    Scales are of float16."""
    count, most = int(groups.max()) + 1, (1 << bits) - 1
    index = groups.expand_as(weight)
    spread = weight.new_zeros(len(weight), count)
    low = spread.scatter_reduce(1, index, weight, "amin")
    high = spread.scatter_reduce(1, index, weight, "amax")
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).clamp(min=1e-5).half()
    zeros = (-low / scales.float()).round().clamp(1, most)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    wide, middle = scales.float()[:, groups], zeros[:, groups]
    codes = (weight / wide + middle).round().clamp(0, most)
    return codes, zeros, scales, (codes - middle) * wide


@dataclass(frozen=True)
class Fp8:
    """With scales of blocks; (1, K) are outputs, (N, K) the whole."""

    block: tuple[int, int] | None
    leaf: str = "weight_scale_inv"
    scale: torch.dtype = torch.float32
    extra: str | None = None

    def __call__(self, weight: Tensor) -> Quantized:
        rows, columns = self.block or weight.shape
        columns = min(columns, weight.shape[1])
        scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        codes, values = weight.to(FP8), torch.empty_like(weight)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scales[i, j] = scale = (weight[at].abs().max() / 448).to(self.scale).float()
                codes[at] = (weight[at] / scale).clamp(-448, 448).to(FP8)
                values[at] = codes[at].float() * scale
        stored = {"weight": codes, self.leaf: scales.to(self.scale)}
        if self.block is None:
            stored[self.leaf] = scales.reshape(1 if self.leaf == "weight_scale" else ())
        if self.extra:
            stored[self.extra] = torch.full((1,), 0.01)
        return stored, values


@dataclass(frozen=True)
class Int8:
    def __call__(self, weight: Tensor) -> Quantized:
        scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
        codes = (weight / scales.float()).round().clamp(-128, 127)
        return {"weight": codes.char(), "weight_scale": scales}, codes * scales.float()


@dataclass(frozen=True)
class Gptq:
    bits: int
    group: int
    symmetric: bool
    reordered: bool = False
    offset: int = 1

    def __call__(self, weight: Tensor) -> Quantized:
        groups = order(weight.shape[1], self.group, self.reordered)
        codes, zeros, scales, values = integers(weight, self.bits, groups, self.symmetric)
        return {
            "qweight": words(codes, self.bits).t().contiguous(),
            "qzeros": words(zeros.t() - self.offset, self.bits),
            "scales": scales.t().contiguous(),
            "g_idx": groups.int(),
            "bias": torch.zeros(len(weight), dtype=torch.float16),
        }, values


@dataclass(frozen=True)
class Awq:
    group: int

    def __call__(self, weight: Tensor) -> Quantized:
        groups = order(weight.shape[1], self.group)
        codes, zeros, scales, values = integers(weight, 4, groups, symmetric=False)
        return {
            "qweight": words(codes.t(), 4, AWQ_ORDER),
            "qzeros": words(zeros.t(), 4, AWQ_ORDER),
            "scales": scales.t().contiguous(),
        }, values


@dataclass(frozen=True)
class PackQuantized:
    bits: int
    group: int
    symmetric: bool
    reordered: bool = False

    def __call__(self, weight: Tensor) -> Quantized:
        groups = order(weight.shape[1], self.group, self.reordered)
        codes, zeros, scales, values = integers(weight, self.bits, groups, self.symmetric)
        stored = {
            "weight_packed": words(codes, self.bits),
            "weight_scale": scales.bfloat16() if self.symmetric else scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if self.symmetric:
            middle = 1 << (self.bits - 1)
            values = (codes - middle) * stored["weight_scale"].float()[:, groups]
        else:
            stored["weight_zero_point"] = words(zeros.t(), self.bits).t().contiguous()
        if self.reordered:
            stored["weight_g_idx"] = groups.int()
        return stored, values


@dataclass(frozen=True)
class Fp4:
    """NVFP4, or MXFP4 with powers of two."""

    group: int
    powers: bool

    def __call__(self, weight: Tensor) -> Quantized:
        parts = weight.unflatten(1, (-1, self.group))
        wanted = parts.abs().amax(-1) / 6
        stored: dict[str, Tensor] = {}
        if self.powers:
            exponents = wanted.log2().ceil()
            scales, stored["weight_scale"] = exponents.exp2(), (exponents + 127).to(torch.uint8)
        else:
            whole = 448 * 6 / weight.abs().max()
            stored["weight_scale"] = (wanted * whole).to(FP8)
            stored["weight_global_scale"] = whole.reshape(1)
            scales = stored["weight_scale"].float() / whole
        codes = ((parts / scales[..., None])[..., None] - E2M1).abs().argmin(-1)
        values = (E2M1[codes] * scales[..., None]).flatten(1)
        codes = codes.flatten(1).to(torch.uint8)
        stored["weight_packed"] = codes[:, ::2] | codes[:, 1::2] << 4
        return stored, values


def mx_experts(weights: Tensor) -> Quantized:
    """gpt-oss' experts [E, K, N] in MXFP4: blocks and scales of the transposed ones."""
    stored, values = Fp4(32, powers=True)(weights.transpose(1, 2).flatten(0, 1))
    experts, inputs, outputs = weights.shape
    blocks = stored["weight_packed"].view(experts, outputs, inputs // 32, 16)
    scales = stored["weight_scale"].view(experts, outputs, inputs // 32)
    values = values.view(experts, outputs, inputs).transpose(1, 2).contiguous()
    return {"blocks": blocks, "scales": scales}, values


def order(columns: int, group: int, mixed: bool = False) -> Tensor:
    """Each column's group."""
    at = torch.arange(columns)
    if mixed:
        at = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    return at // (columns if group == -1 else group)


def compressed(format: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "output_activations": None} | more
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _floats(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy} | more


def _packed(bits: int, group: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group == -1 else {"group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric} | strategy | more


_DYNAMIC = {
    "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
}
_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
# Those whose activations are rounded too: inputs that share a scale (None: all of a token's), or
# what the scale is.
ROUNDED: dict[str, int | float | None] = {
    "fp8 128 × 128": 128,
    "fp8 blocks": 20,
    "fp8 tensor": 0.01,
    "fp8 of AutoFP8": 0.01,
    "compressed fp8 outputs": None,
    "compressed fp8 tensor": 0.01,
}
FORMATS: dict[str, tuple[Callable[[Tensor], Quantized], dict[str, Any]]] = {
    "fp8 128 × 128": (Fp8((128, 128)), _BLOCK | {"weight_block_size": [128, 128]}),
    "fp8 blocks": (Fp8((24, 20)), _BLOCK | {"weight_block_size": [24, 20]}),
    "fp8 tensor": (
        Fp8(None, extra="activation_scale"),
        _BLOCK | {"activation_scheme": "static", "weight_block_size": None},
    ),
    "fp8 of AutoFP8": (
        Fp8(None, "weight_scale", extra="input_scale"),
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    ),
    "compressed fp8 outputs": (
        Fp8((1, 1 << 20), "weight_scale", torch.bfloat16),
        compressed("float-quantized", _floats("channel"), **_DYNAMIC),
    ),
    "compressed fp8 tensor": (
        Fp8(None, "weight_scale", extra="input_scale"),
        compressed(
            "float-quantized",
            _floats("tensor"),
            input_activations={"num_bits": 8, "type": "float", "dynamic": False},
        ),
    ),
    "compressed fp8 blocks": (
        Fp8((32, 32), "weight_scale"),
        compressed("float-quantized", _floats("block", block_structure=[32, 32])),
    ),
    "compressed int8": (
        Int8(),
        compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    ),
    "gptq": (Gptq(4, 16, True), {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "gptq asymmetric": (
        Gptq(4, 32, False, offset=0),
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "sym": False,
            "checkpoint_format": "gptq_v2",
        },
    ),
    "gptq desc_act": (
        Gptq(4, 16, False, reordered=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True},
    ),
    "gptq 8 bits": (Gptq(8, -1, False), {"quant_method": "gptq", "bits": 8, "group_size": -1}),
    "awq": (
        Awq(16),
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 16,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
    ),
    "pack-quantized": (
        PackQuantized(4, 32, True),
        compressed("pack-quantized", _packed(4, 32, True)),
    ),
    "pack-quantized asymmetric": (
        PackQuantized(4, 16, False),
        compressed("pack-quantized", _packed(4, 16, False)),
    ),
    "pack-quantized actorder": (
        PackQuantized(4, 16, True, reordered=True),
        compressed("pack-quantized", _packed(4, 16, True, actorder="group")),
    ),
    "pack-quantized 8 bits": (
        PackQuantized(8, -1, False),
        compressed("pack-quantized", _packed(8, -1, False)),
    ),
    "nvfp4": (
        Fp4(16, powers=False),
        compressed(
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
    ),
    "mxfp4": (
        Fp4(32, powers=True),
        compressed(
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        ),
    ),
}


EXPERTS: dict[str, tuple[Callable[[Tensor], Quantized], dict[str, Any]]] = {
    "mxfp4 experts": (
        mx_experts,
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    )
}


def rounded(x: Tensor, by: int | float | None) -> Tensor:
    """Inputs x [..., K] of a linear, rounded as a value of ``ROUNDED`` says."""
    if isinstance(by, float):
        return (x / by).clamp(-448, 448).to(FP8).float() * by
    parts = x.split(by or x.shape[-1], -1)
    scales = [part.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448 for part in parts]
    pairs = zip(parts, scales, strict=True)
    return torch.cat([(part / scale).to(FP8).float() * scale for part, scale in pairs], -1)


def quantize(plain: Path, folder: Path, format: str) -> tuple[Path, Path]:
    """Of the checkpoint ``plain`` with one file: one whose layers' linears are in a format of
    ``FORMATS``, or whose experts in one of ``EXPERTS``, and one with the weights that it stands
    for."""
    to_codes, settings = (FORMATS | EXPERTS)[format]
    quantized, reference = folder / "quantized", folder / "reference"
    for path in (quantized, reference):
        shutil.copytree(plain, path)
    config = json.loads((plain / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    codes, values = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        linear = tensor.dim() == 2 and ".layers." in name and not name.endswith(".gate.weight")
        if tensor.dim() != 3 if format in EXPERTS else not linear:
            codes[name] = values[name] = tensor
            continue
        stored, values[name] = to_codes(tensor)
        stem = f"{name}_" if format in EXPERTS else name.removesuffix("weight")
        codes = {stem + leaf: stored[leaf] for leaf in stored} | codes
    save_file(codes, quantized / "model.safetensors")
    save_file(values, reference / "model.safetensors")
    return quantized, reference
