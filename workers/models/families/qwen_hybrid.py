"""Qwen3-Next and Qwen 3.5: three layers of gated delta nets to one of gated attention, or as
``layer_types`` say; norms' weights are added to 1, and a quarter of a head is rotated."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import QKNorm
from workers.layers.delta_net import DeltaTraits
from workers.layers.experts import ExpertTraits, SharedExpert
from workers.layers.rotary import FULL, read_rope
from workers.layers.routing import Routing
from workers.models.decoder import DecoderTraits, LayerTraits
from workers.models.families.llama import COMMON, read_decoder, read_heads
from workers.models.families.moe import read_chosen, with_experts
from workers.models.families.qwen import with_sparse_experts

LINEAR = "linear_attention"
QWEN3_NEXT: dict[str, Any] = COMMON | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
QWEN3_5: dict[str, Any] = QWEN3_NEXT | {
    "num_experts": None,
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
QWEN3_5_MOE: dict[str, Any] = QWEN3_NEXT | {
    "vocab_size": 248320,
    "num_hidden_layers": 40,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}
HONOURED = {"attention_bias", "partial_rotary_factor", "layer_types"}
IMAGES = {"mrope_section", "mrope_interleaved"}  # how images are rotated; of a text all are alike


def read_qwen3_5(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    return _read(config.over(QWEN3_5), HONOURED, by_head=False)


def read_qwen3_next(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(QWEN3_NEXT)
    traits = _read(config, HONOURED | {"num_experts"}, by_head=True)
    if not config.whole("num_experts", 0):
        return traits
    normed = config.boolean("norm_topk_prob", True)
    return with_sparse_experts(config, traits, _read_experts(config, normed))


def read_qwen3_5_moe(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(QWEN3_5_MOE)
    traits = _read(config, HONOURED | {"num_experts"}, by_head=False)
    return with_experts(traits, _read_experts(config, normed=True))


def _read_experts(config: Config, normed: bool) -> ExpertTraits:
    count = config.integer("num_experts")
    shared = SharedExpert(
        config.integer("shared_expert_intermediate_size"), "shared_expert", "shared_expert_gate"
    )
    routing = Routing(read_chosen(config, count), normed=normed)
    return ExpertTraits(count, config.integer("moe_intermediate_size"), routing, shared)


def _read(config: Config, honoured: set[str], *, by_head: bool) -> DecoderTraits:
    longest = config.integer("max_position_embeddings")
    size = read_heads(config).size
    rope = read_rope(config, size, longest, partial=True, others=frozenset(IMAGES))
    traits = read_decoder(config, honoured, rope=rope)
    delta = LayerTraits(None, delta=_read_delta(config, by_head))
    kinds = {FULL: LayerTraits(rope), LINEAR: delta}
    return replace(
        traits,
        norm_offset=1.0,
        qk_norm=QKNorm(traits.norm_eps, offset=1.0),
        gated_attention=True,
        layers=tuple(kinds[kind] for kind in _read_kinds(config, traits.num_layers)),
    )


def _read_kinds(config: Config, layers: int) -> list[str]:
    every = config.integer("full_attention_interval", 4)
    kinds = config.get("layer_types", [LINEAR if (i + 1) % every else FULL for i in range(layers)])
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (LINEAR, FULL) for kind in kinds)
    ):
        raise config.error("layer_types", f"must hold {layers} times {FULL} or {LINEAR}")
    if FULL not in kinds:
        raise config.error("layer_types", f"must hold {FULL}")
    return kinds


def _read_delta(config: Config, by_head: bool) -> DeltaTraits:
    traits = DeltaTraits(
        key_heads=config.integer("linear_num_key_heads"),
        value_heads=config.integer("linear_num_value_heads"),
        key_size=config.integer("linear_key_head_dim"),
        value_size=config.integer("linear_value_head_dim"),
        taps=config.integer("linear_conv_kernel_dim"),
        by_head=by_head,
    )
    if traits.value_heads % traits.key_heads:
        raise config.error(
            "linear_num_value_heads",
            f"must be a multiple of linear_num_key_heads ({traits.key_heads})",
        )
    if traits.taps < 2:
        raise config.error("linear_conv_kernel_dim", "must be at least 2")
    return traits
