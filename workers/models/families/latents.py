"""What the configs of latent attention say alike."""

import math
from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import Heads
from workers.layers.latent_attention import LatentTraits
from workers.layers.rotary import Rope, read_rope
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder

LATENTS: dict[str, Any] = COMMON | {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
}
HONOURED = {"kv_lora_rank", "attention_bias", "n_routed_experts"}


def read_latents(config: Config) -> DecoderTraits:
    """The traits of the network without its experts.

    Raises CheckpointError, naming the field, for what would change the mathematics.
    """
    rotated, heads = config.integer("qk_rope_head_dim"), config.integer("num_attention_heads")
    if config.integer("num_key_value_heads", heads) != heads:
        raise config.error("num_key_value_heads", f"must be num_attention_heads ({heads})")
    latents = LatentTraits(
        rank=config.integer("kv_lora_rank"),
        query_rank=config.integer("q_lora_rank") if "q_lora_rank" in config else None,
        nope=config.integer("qk_nope_head_dim"),
        value=config.integer("v_head_dim"),
    )
    rope = read_rope(config, rotated, config.integer("max_position_embeddings"))
    rope = replace(rope, interleaved=config.boolean("rope_interleave", True))
    # What this is in config.json differs; the latents have one of their own.
    sized = Config(config.values | {"head_dim": rotated}, config.source)
    return replace(
        read_decoder(sized, HONOURED, rope=rope),
        heads=Heads(heads, 1, rotated + latents.rank),
        latents=latents,
        attention_scale=(latents.nope + rotated) ** -0.5 * _sharper(config, rope),
    )


def _sharper(config: Config, rope: Rope) -> float:
    """What yarn multiplies the scores by."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = Config(config.get(key, {}), f"{config.source}: {key}")
    if not scaling.get("mscale_all_dim") or rope.factor <= 1:
        return 1.0
    return (0.1 * scaling.number("mscale_all_dim") * math.log(rope.factor) + 1) ** 2


def check_experts(config: Config, scores: str, *methods: str) -> str:
    """The ``topk_method``, one of ``methods``. Raises CheckpointError for another, for another
    function than ``scores``, and for experts in some of the layers."""
    config.choice("scoring_func", scores, (scores,))
    if config.integer("moe_layer_freq", 1) != 1:
        raise config.error("moe_layer_freq", "must be 1")
    return config.choice("topk_method", methods[0], methods)


def draft_layers(config: Config) -> int:
    """How many layers to predict further tokens a checkpoint may have behind the others."""
    return config.whole("num_nextn_predict_layers", 1)
