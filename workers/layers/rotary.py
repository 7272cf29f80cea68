"""Rotary position embeddings (arXiv 2104.09864) and the scalings of Llama-like checkpoints.

The formulas are those of transformers' ``modeling_rope_utils`` and are tested equal to it.
"""

import math
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint import MOST_INTEGER, NUMBERS, Config
from workers.parallel import Place

FULL = "full_attention"
WINDOW = "sliding_attention"
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
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
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "proportional": {"factor", "partial_rotary_factor"},
}


@dataclass(frozen=True)
class Rope:
    """One checkpoint's rotary embedding. ``original`` is the length it was first trained for;
    ``head_dim`` is how many of a head's dimensions, from the first on, are rotated: in pairs of one
    from each half or, ``interleaved``, of neighbours (see ``halves``). Of a "proportional" one the
    first ``turning`` pairs turn, and the others stand."""

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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turning: int = 0
    interleaved: bool = False

    @property
    def longest(self) -> int:
        """The longest context in tokens that the scaling is meant for."""
        if self.kind in ("linear", "dynamic"):
            return int(self.max_position * self.factor)
        if self.kind == "yarn":
            return max(self.max_position, int(self.original * self.factor))
        return self.max_position


def read_rope(
    config: Config,
    head_dim: int,
    max_position: int,
    *,
    partial: bool = False,
    others: Set[str] = frozenset(),
) -> Rope:
    """The rotary embedding that a config.json describes.

    Both layouts are known: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``
    (transformers 5). ``partial``: ``partial_rotary_factor`` is honoured; ``others`` are fields of
    the object that the caller reads. Raises CheckpointError for an unknown type or field.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(key, {})
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise config.error(key, "must be one flat object for all layers")
    rope = Config(values, f"{config.source}: {key}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        raise rope.error("rope_type" if "rope_type" in rope else "type", _allowed(KINDS))
    allowed = sorted(HARMLESS | FIELDS[kind] | others)
    for field in values:
        if field == "partial_rotary_factor" and (partial or rope.get(field, 1.0) == 1.0):
            continue
        if field not in allowed and rope.get(field) is not None:
            raise rope.error(field, f"is not supported for type {kind}; {_allowed(allowed)}")
    if partial and kind != "proportional":
        share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
        if share > 1:
            raise config.error("partial_rotary_factor", f"must be at most 1, not {share:g}")
        head_dim = int(head_dim * share)
    if head_dim % 2 or not head_dim:
        raise config.error("head_dim", f"rotary embeddings need an even head size, not {head_dim}")
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    # transformers lets the top-level field win over the one in the object.
    outer = "original_max_position_embeddings" in config
    original = (config if outer else rope).integer("original_max_position_embeddings", max_position)
    if kind == "default":
        return Rope(head_dim, theta, max_position)
    plain = Rope(head_dim, theta, max_position, kind, original=original)
    found = _long(rope, plain) if kind == "longrope" else _scaled(rope, kind, plain)
    if found.longest > MOST_INTEGER:
        raise rope.error("factor", f"must leave at most {MOST_INTEGER} positions")
    return found


def _scaled(rope: Config, kind: str, plain: Rope) -> Rope:
    """``plain`` with the scaling that the object describes."""
    max_position, original = plain.max_position, plain.original
    if kind == "yarn" and "factor" not in rope:
        factor = max_position / original
    else:
        factor = rope.number("factor", 1.0 if kind == "proportional" else None)
    if kind == "dynamic" and plain.head_dim <= 2:
        raise rope.error("rope_type", "dynamic needs a head size over 2")
    if kind in ("linear", "dynamic"):
        return replace(plain, factor=factor, original=0)
    if kind == "proportional":
        share = rope.number("partial_rotary_factor", 1.0)
        if share > 1:
            raise rope.error("partial_rotary_factor", f"must be at most 1, not {share:g}")
        turning = int(share * plain.head_dim // 2)
        return replace(plain, factor=factor, original=0, turning=turning)
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


def read_layer_ropes(
    config: Config, head_dim: int, max_position: int, local_theta: float | None = None
) -> dict[str, Rope]:
    """The rotary embedding of each kind of layer, where those with a window have one of their own.

    ``rope_parameters`` holds an object for each kind (transformers 5); else ``rope_scaling`` is
    that of the layers without a window, and ``local_theta`` is the others' base. Raises
    CheckpointError as ``read_rope`` does.
    """
    theta = config.number("rope_theta", 10_000.0)
    scaling = config.get("rope_scaling", {})
    default = {FULL: scaling, WINDOW: {}}
    given = default if scaling else config.get("rope_parameters", default)
    if not isinstance(given, dict) or given.keys() - {FULL, WINDOW}:
        raise config.error("rope_parameters", f"must hold an object for {FULL} and for {WINDOW}")
    thetas = {FULL: theta, WINDOW: local_theta or theta}
    return {
        kind: read_rope(
            Config({"rope_parameters": given.get(kind), "rope_theta": base}, config.source),
            head_dim,
            max_position,
        )
        for kind, base in thetas.items()
    }


def _long(rope: Config, plain: Rope) -> Rope:
    """``plain`` with a factor for each pair of dimensions (LongRoPE, arXiv 2402.13753)."""
    factor = rope.number("factor", plain.max_position / plain.original)
    grown = 1.0
    if factor > 1:
        if plain.original < 2:
            raise rope.error("original_max_position_embeddings", "longrope needs one over 1")
        grown = math.sqrt(1 + math.log(factor) / math.log(plain.original))
    return replace(
        plain,
        factor=factor,
        attention_factor=rope.number("attention_factor", grown),
        short_factors=_factors(rope, "short_factor", plain.head_dim // 2),
        long_factors=_factors(rope, "long_factor", plain.head_dim // 2),
    )


def _factors(rope: Config, field: str, count: int) -> tuple[float, ...]:
    given = rope.get(field)
    least, most = NUMBERS
    if (
        not isinstance(given, list)
        or len(given) != count
        or any(isinstance(x, bool) or not isinstance(x, int | float) for x in given)
        or any(not least <= x <= most for x in given)
    ):
        raise rope.error(field, f"must be a list of {count} positive numbers")
    return tuple(map(float, given))


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

    For "dynamic" the result is [length, head_dim / 2], each position having its own. For "longrope"
    it is the long factors' as soon as ``length`` is over the original one, for every position: a
    sequence that grows past it must not mix two rotations. Else ``length`` does not matter.
    """
    dim = rope.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if rope.kind == "dynamic":
        return _dynamic(rope, exponents, length)
    if rope.kind == "longrope":
        factors = rope.long_factors if length > rope.original else rope.short_factors
        return 1.0 / (torch.tensor(factors) * rope.theta**exponents)
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "proportional":
        return (frequencies / rope.factor).masked_fill(torch.arange(dim // 2) >= rope.turning, 0)
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


def halves(rope: Rope, size: int, heads: int) -> Tensor:
    """The order of ``heads`` heads' dimensions, each of ``size``, in which interleaved pairs stand
    as halves. What q and k are both reordered by, their products do not see."""
    rotated, rest = torch.arange(rope.head_dim), torch.arange(rope.head_dim, size)
    head = torch.cat((rotated[::2], rotated[1::2], rest))
    return (torch.arange(heads)[:, None] * size + head).flatten()


class Rotary:
    """Tables of cos and sin for positions 0 to ``length`` - 1: [length, head_dim / 2], float32."""

    def __init__(self, rope: Rope, length: int, place: Place) -> None:
        positions = torch.arange(length, dtype=torch.float32)[:, None]
        angles = positions * inverse_frequencies(rope, length)
        self.rope = rope
        self.cos = (angles.cos() * rope.attention_factor).to(place.device)
        self.sin = (angles.sin() * rope.attention_factor).to(place.device)


@dataclass(frozen=True)
class PositionScale:
    """1 + beta · log(1 + ⌊position / original⌋): queries grow in long contexts (Llama 4)."""

    beta: float
    original: int

    def table(self, length: int, place: Place) -> Tensor | None:
        """The scales of positions 0 to ``length`` - 1, in the model's type; None if all are 1."""
        if length <= self.original:
            return None
        steps = torch.arange(length) // self.original
        return (1 + self.beta * torch.log1p(steps)).to(place.device, place.dtype)
