"""Mistral and Ministral 3: a window in every layer or in none."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.rotary import PositionScale, Rope, read_rope
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, read_heads, with_one_window

MISTRAL: dict[str, Any] = COMMON | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
MINISTRAL3: dict[str, Any] = MISTRAL | {
    "vocab_size": 131072,
    "num_hidden_layers": 34,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
MINISTRAL3_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    return _mistral(config.over(MISTRAL))


def read_ministral3(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``. Queries grow with their position, as in Llama 4."""
    config = config.over(MINISTRAL3)
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    if key not in config:
        config = Config(config.values | {key: MINISTRAL3_ROPE}, config.source)
    heads = read_heads(config)
    others = {"llama_4_scaling_beta", "max_position_embeddings"}
    longest = config.integer("max_position_embeddings")
    rope = read_rope(config, heads.size, longest, others=others)
    values = Config(config.get(key), f"{config.source}: {key}")
    if "llama_4_scaling_beta" not in values:
        return _mistral(config, rope)
    original = values.integer("original_max_position_embeddings", longest)
    scale = PositionScale(values.number("llama_4_scaling_beta"), original)
    return replace(_mistral(config, rope), query_scale=scale)


def _mistral(config: Config, rope: Rope | None = None) -> DecoderTraits:
    return with_one_window(config, read_decoder(config, {"sliding_window"}, rope=rope))
