"""Rotary position embeddings (arXiv 2104.09864) and the scalings of Llama-like checkpoints.

The formulas are those of transformers' ``modeling_rope_utils`` and are tested equal to it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint import MOST_INTEGER, Config
from workers.parallel import Place

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
HARMLESS = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


@dataclass(frozen=True)
class Rope:
    """One checkpoint's rotary embedding. ``original`` is the length it was first trained for."""

    head_dim: int
    theta: float
    max_position: int
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def longest(self) -> int:
        """The longest context in tokens that the scaling is meant for."""
        if self.kind in ("linear", "dynamic"):
            return int(self.max_position * self.factor)
        if self.kind == "yarn":
            return max(self.max_position, int(self.original * self.factor))
        return self.max_position


def read_rope(config: Config, head_dim: int, max_position: int) -> Rope:
    """The rotary embedding that a config.json describes.

    Both layouts are known: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``
    (transformers 5). Raises CheckpointError for an unknown type or field.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(key, {})
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise config.error(key, "must be one flat object for all layers")
    rope = Config(values, f"{config.source}: {key}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        raise rope.error("rope_type" if "rope_type" in rope else "type", _allowed(KINDS))
    for field in values:
        if field == "partial_rotary_factor" and rope.get(field, 1.0) == 1.0:
            continue
        if field not in HARMLESS | FIELDS[kind] and rope.get(field) is not None:
            allowed = sorted(HARMLESS | FIELDS[kind])
            raise rope.error(field, f"is not supported for type {kind}; {_allowed(allowed)}")
    if head_dim % 2:
        raise config.error("head_dim", f"rotary embeddings need an even head size, not {head_dim}")
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    # transformers lets the top-level field win over the one in the object.
    outer = "original_max_position_embeddings" in config
    original = (config if outer else rope).integer("original_max_position_embeddings", max_position)
    if kind == "default":
        return Rope(head_dim, theta, max_position)
    found = _scaled(rope, kind, Rope(head_dim, theta, max_position, kind, original=original))
    if found.longest > MOST_INTEGER:
        raise rope.error("factor", f"must leave at most {MOST_INTEGER} positions")
    return found


def _scaled(rope: Config, kind: str, plain: Rope) -> Rope:
    """``plain`` with the scaling that the object describes."""
    max_position, original = plain.max_position, plain.original
    if kind == "yarn" and "factor" not in rope:
        factor = max_position / original
    else:
        factor = rope.number("factor")
    if kind == "dynamic" and plain.head_dim <= 2:
        raise rope.error("rope_type", "dynamic needs a head size over 2")
    if kind in ("linear", "dynamic"):
        return replace(plain, factor=factor, original=0)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if not low < high:
            raise rope.error("high_freq_factor", f"must be over low_freq_factor ({low:g})")
        return replace(plain, factor=factor, low_freq_factor=low, high_freq_factor=high)
    if not plain.theta > 1:
        raise rope.error("rope_theta", "yarn needs one over 1")
    return replace(
        plain,
        factor=factor,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
    )


def _allowed(names: Any) -> str:
    return f"allowed: {', '.join(names)}"


def _yarn_attention_factor(rope: Config, factor: float) -> float:
    if "attention_factor" in rope:
        return rope.number("attention_factor")

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = (
        rope.number(name) if rope.get(name) else None for name in ("mscale", "mscale_all_dim")
    )
    return float(mscale(top) / mscale(bottom)) if top and bottom else mscale(1.0)


def inverse_frequencies(rope: Rope, length: int) -> Tensor:
    """Radians a position of each pair of dimensions: [head_dim / 2], float32.

    For "dynamic" the result is [length, head_dim / 2], each position having its own; else it
    does not depend on ``length``.
    """
    dim = rope.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if rope.kind == "dynamic":
        return _dynamic(rope, exponents, length)
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, exponents)
    return frequencies


def _dynamic(rope: Rope, exponents: Tensor, length: int) -> Tensor:
    """NTK scaling of the base with the sequence's length (reddit.com/r/LocalLLaMA, u/emozilla).

    transformers scales by the longest sequence of the forward pass at hand, so that a token's
    rotation depends on how prompts were batched and cut. Here the token at position p is rotated
    as in a sequence of p + 1 tokens: what transformers does for every generated token, and for a
    prompt no longer than ``max_position_embeddings``. A longer prompt is treated as if it had been
    generated, so that chunks, cached prefixes and recomputation all agree.
    """
    lengths = torch.arange(1, length + 1).clamp(min=rope.max_position)
    growth = rope.factor * lengths / rope.max_position - (rope.factor - 1)
    base = rope.theta * growth ** (rope.head_dim / (rope.head_dim - 2))
    return 1.0 / base[:, None] ** exponents


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, a ramp between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    low = rope.original / rope.low_freq_factor
    high = rope.original / rope.high_freq_factor
    ramp = (rope.original / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    medium = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
    scaled = torch.where(wavelengths > low, frequencies / rope.factor, medium)
    return torch.where(wavelengths < high, frequencies, scaled)


def _yarn(rope: Rope, exponents: Tensor) -> Tensor:
    """Interpolation of the dimensions that turn slowly, a ramp to the others (arXiv 2309.00071)."""

    def dimension(rotations: float) -> float:
        turns = rope.original / (rotations * 2 * math.pi)
        return rope.head_dim * math.log(turns) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.head_dim - 1)
    if first == last:
        last += 0.001
    periods = rope.theta**exponents
    ramp = (torch.arange(rope.head_dim // 2, dtype=torch.float32) - first) / (last - first)
    interpolated = ramp.clamp(0, 1)
    return interpolated / (rope.factor * periods) + (1 - interpolated) / periods


class Rotary:
    """Tables of cos and sin for positions 0 to ``length`` - 1: [length, head_dim / 2], float32."""

    def __init__(self, rope: Rope, length: int, place: Place) -> None:
        positions = torch.arange(length, dtype=torch.float32)[:, None]
        angles = positions * inverse_frequencies(rope, length)
        self.cos = (angles.cos() * rope.attention_factor).to(place.device)
        self.sin = (angles.sin() * rope.attention_factor).to(place.device)
