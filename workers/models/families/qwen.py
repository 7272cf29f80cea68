"""Qwen2 and Qwen3: biases of q, k and v, or norms of their heads; windows from some layer on. And
Qwen3's mixtures of experts."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import QKNorm
from workers.layers.experts import ExpertTraits
from workers.layers.rotary import FULL, WINDOW
from workers.layers.routing import Routing
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import (
    COMMON,
    read_decoder,
    read_kinds,
    with_one_window,
    with_windows,
)
from workers.models.families.moe import read_chosen

QWEN2: dict[str, Any] = COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN3: dict[str, Any] = QWEN2 | {"head_dim": 128}
QWEN3_MOE: dict[str, Any] = QWEN2 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
EXPERTS = ("num_experts", "num_local_experts")


def read_qwen2(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(QWEN2)
    traits = replace(read_decoder(config, {"sliding_window"}), qkv_bias=True)
    return _windowed(config, traits)


def read_qwen3(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(QWEN3)
    traits = read_decoder(config, {"sliding_window", "attention_bias"})
    return _windowed(config, replace(traits, qk_norm=QKNorm(traits.norm_eps)))


def read_qwen3_moe(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(QWEN3_MOE)
    named = next((name for name in EXPERTS if name in config), EXPERTS[0])
    traits = read_decoder(config, {"sliding_window", "attention_bias", *EXPERTS})
    count = config.integer(named, 128)
    normed = config.boolean("norm_topk_prob", False)
    routing = Routing(read_chosen(config, count), normed=normed)
    experts = ExpertTraits(count, config.integer("moe_intermediate_size"), routing)
    if config.boolean("use_sliding_window", False):
        traits = with_one_window(config, traits)
    return with_sparse_experts(config, replace(traits, qk_norm=QKNorm(traits.norm_eps)), experts)


def with_sparse_experts(
    config: Config, traits: DecoderTraits, experts: ExpertTraits
) -> DecoderTraits:
    """``traits`` with experts in every ``decoder_sparse_step``-th layer but ``mlp_only_layers``."""
    step, dense = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise config.error("mlp_only_layers", "must be a list of layers' numbers")
    layers = (
        replace(layer, experts=None if i in dense or (i + 1) % step else experts)
        for i, layer in enumerate(traits.layers)
    )
    return replace(traits, layers=tuple(layers))


def _windowed(config: Config, traits: DecoderTraits) -> DecoderTraits:
    """``traits`` with the windows of ``layer_types``, else of the layers from
    ``max_window_layers`` on."""
    window = None
    if config.boolean("use_sliding_window", False) and "sliding_window" in config:
        window = config.integer("sliding_window")
    first = config.values.get("max_window_layers", traits.num_layers)
    if isinstance(first, bool) or not isinstance(first, int):
        raise config.error("max_window_layers", "must be an integer")
    implied = [WINDOW if window and i >= first else FULL for i in range(traits.num_layers)]
    kinds = read_kinds(config, implied, choose=True)
    if WINDOW in kinds and window is None:
        raise config.error("layer_types", "needs use_sliding_window and sliding_window")
    return with_windows(config, traits, kinds, dict.fromkeys(kinds, traits.layers[0].rope))
