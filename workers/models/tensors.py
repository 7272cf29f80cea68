"""The names that checkpoints give a decoder's tensors, and tensors that hold several of them."""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from workers.weights import Piece

if TYPE_CHECKING:
    from workers.models.decoder import DecoderTraits

# Mixtral's own names for the parts of an expert.
EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def text_name(name: str) -> str | None:
    """A tensor's name in the text model of an image-text checkpoint; None for one of other parts.

    Both layouts are known: ``model.language_model.layers`` (transformers 5) and
    ``language_model.model.layers``.
    """
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    return name if name.startswith("lm_head.") else None


def decoder_name(name: str) -> str | None:
    """The parameter name of a checkpoint tensor; None for one known to mean nothing."""
    # Written by old versions of transformers; computed from the config.
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith("mtp."):  # of layers that draft further tokens
        return None
    name = name.replace(".block_sparse_moe.", ".mlp.")
    name = name.replace(".router.scale", ".router.norm.weight")
    name = re.sub(r"(\.experts\.\d+)\.(w[123])\.", _expert_part, name)
    # A checkpoint of the network without a head has no name for the whole.
    bare = name.startswith(("embed_tokens.", "layers.", "norm."))
    return f"model.{name}" if bare else name


def layer_of(name: str) -> int:
    """The number of the layer that a tensor is in; -1 for one outside of layers."""
    found = re.match(r"(?:model\.)?layers\.(\d{1,9})\.", name)
    return int(found[1]) if found else -1


def _expert_part(match: re.Match[str]) -> str:
    return f"{match[1]}.{EXPERT_PARTS[match[2]]}."


def decoder_pieces(name: str, traits: "DecoderTraits") -> list[Piece]:
    """The parameters in tensor ``name``: q, k and v, gate and up (Phi 3), or all experts of a layer
    (transformers 5). Empty for a tensor that is one parameter."""
    module, _, leaf = name.rpartition(".")
    if name.endswith(".self_attn.qkv_proj.weight"):
        heads = traits.heads
        widths = [count * heads.size for count in (heads.count, heads.kv_count, heads.kv_count)]
        stem = module.removesuffix("qkv_proj")
        return _stacked([f"{stem}{part}_proj.{leaf}" for part in "qkv"], widths, traits)
    if name.endswith(".mlp.gate_up_proj.weight"):
        names = [module.replace("gate_up_proj", f"{part}_proj") for part in ("gate", "up")]
        widths = [traits.intermediate_size] * 2
        return _stacked([f"{part}.{leaf}" for part in names], widths, traits)
    if re.fullmatch(r"model\.layers\.\d+\.linear_attn\.(in_proj_qkv|conv1d)\.weight", name):
        return _delta(module, leaf, traits)
    if re.fullmatch(r"model\.layers\.\d+\.(mlp\.)?experts\.(gate_up|down)_proj(_[a-z]+)?", name):
        return _experts(module, leaf, traits)
    return []


def side_by_side(
    names: list[str],
    widths: Sequence[int],
    at: tuple[int | slice, ...] = (),
    shape: tuple[int, ...] = (),
) -> list[Piece]:
    """Parameters that are rows, so many each, of a tensor [Σ widths, *shape]; ``at`` is their place
    in its other dimensions."""
    starts = accumulate(widths, initial=0)
    return [
        Piece(name, (slice(start, start + width), *at), (sum(widths), *shape))
        for name, width, start in zip(names, widths, starts, strict=False)
    ]


def convolution_pieces(
    stem: str, parts: Iterable[str], leaf: str, widths: Sequence[int], taps: int
) -> list[Piece]:
    """The convolutions ``stem``_part in one tensor: weights [Σ widths, 1, taps], or biases."""
    names = [f"{stem}_{part}.{leaf}" for part in parts]
    if leaf == "bias":
        return side_by_side(names, widths)
    return side_by_side(names, widths, (0, slice(None)), (1, taps))


def _stacked(names: list[str], widths: list[int], traits: "DecoderTraits") -> list[Piece]:
    return side_by_side(names, widths, (slice(None),), (traits.hidden_size,))


def _delta(module: str, leaf: str, traits: "DecoderTraits") -> list[Piece]:
    """q, k and v of a delta net: projections [all, hidden], or convolutions [all, 1, taps]."""
    layer = layer_of(module)
    delta = traits.layers[layer].delta if layer < len(traits.layers) else None
    if delta is None:
        return []
    stem = module.removesuffix("qkv")
    if stem != module:
        return _stacked([f"{stem}{part}.{leaf}" for part in "qkv"], list(delta.widths), traits)
    return convolution_pieces(module, "qkv", leaf, delta.widths, delta.taps)


def _experts(module: str, leaf: str, traits: "DecoderTraits") -> list[Piece]:
    """[experts, 2 · inner, hidden] of gates and ups, or [experts, hidden, inner]; interleaved they
    are [experts, hidden, 2 · inner] and [experts, inner, hidden], beside biases [experts, ...].
    In MXFP4 they are blocks [experts, outputs, inputs / 32, 16] with scales of each."""
    layer = layer_of(module)
    experts = traits.layers[layer].experts if layer < len(traits.layers) else None
    if experts is None:
        return []
    count, inner, turned = experts.count, experts.inner, experts.interleaved
    gates = slice(0, 2 * inner, 2) if turned else slice(0, inner)
    ups = slice(1, 2 * inner, 2) if turned else slice(inner, 2 * inner)
    merged, _, kind = leaf.partition("_proj")
    outputs, inputs, parts = {
        "gate_up": (2 * inner, traits.hidden_size, {"gate_proj": gates, "up_proj": ups}),
        "down": (traits.hidden_size, inner, {"down_proj": slice(None)}),
    }[merged]
    shapes: dict[str, tuple[int, ...]] = {
        "": (outputs, inputs),
        "_bias": (outputs,),
        "_blocks": (outputs, -(-inputs // 32), 16),
        "_scales": (outputs, -(-inputs // 32)),
    }
    if kind not in shapes:
        return []
    own = kind.removeprefix("_") or "weight"

    def piece(name: str, expert: int, cut: slice) -> Piece:
        if turned and not kind:
            shape = (count, inputs, outputs)
            return Piece(f"{name}.{own}", (expert, slice(None), cut), shape, transposed=True)
        rest = (slice(None),) * (len(shapes[kind]) - 1)
        return Piece(f"{name}.{own}", (expert, cut, *rest), (count, *shapes[kind]))

    return [
        piece(f"{module}.{expert}.{part}", expert, cut)
        for expert in range(count)
        for part, cut in parts.items()
    ]
