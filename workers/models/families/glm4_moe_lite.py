"""GLM 4.7 Flash and the like: DeepSeek V3's network, with a list of its dense layers."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.models.decoder import DecoderTraits
from workers.models.families.latents import LATENTS, check_experts, draft_layers, read_latents
from workers.models.families.moe import read_grouped

GLM4_MOE_LITE: dict[str, Any] = LATENTS | {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 1536,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``. Layers with experts are ``sparse`` among ``mlp_layer_types``."""
    config = config.over(GLM4_MOE_LITE)
    check_experts(config, "sigmoid", "noaux_tc")
    traits, experts = read_latents(config), read_grouped(config)
    count = traits.num_layers
    dense = min(config.whole("first_k_dense_replace", 1), count)
    kinds = config.get("mlp_layer_types", ["dense"] * dense + ["sparse"] * (count - dense))
    if (
        not isinstance(kinds, list)
        or len(kinds) != count
        or any(kind not in ("dense", "sparse") for kind in kinds)
    ):
        raise config.error("mlp_layer_types", f"must hold {count} times dense or sparse")
    layers = (
        replace(layer, experts=experts if kind == "sparse" else None)
        for layer, kind in zip(traits.layers, kinds, strict=True)
    )
    return replace(traits, layers=tuple(layers), draft_layers=draft_layers(config))
