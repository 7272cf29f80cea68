"""DeepSeek V2 and V3, and GLM 4's lite mixture: latent attention, dense layers in front of others
with experts."""

import math
from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import Heads
from workers.layers.latent_attention import LatentTraits
from workers.layers.rotary import Rope, read_rope
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder

DEEPSEEK_V2: dict[str, Any] = COMMON | {
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
}
DEEPSEEK_V3: dict[str, Any] = DEEPSEEK_V2 | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
}
GLM4_MOE_LITE: dict[str, Any] = DEEPSEEK_V2 | {
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
}
HONOURED = {"kv_lora_rank", "attention_bias", "n_routed_experts"}


def read_deepseek_v2(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(DEEPSEEK_V2)
    return _read_latents(config, HONOURED | {"mlp_bias"})


def read_deepseek_v3(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(DEEPSEEK_V3)
    return _read_latents(config, HONOURED)


def read_glm4_moe_lite(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GLM4_MOE_LITE)
    return _read_latents(config, HONOURED)


def _read_latents(config: Config, honoured: set[str]) -> DecoderTraits:
    """The traits of the dense network."""
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
        read_decoder(sized, honoured, rope=rope),
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
