"""Phi 3 and Phi 4: q, k, v and gate, up are one tensor each; long contexts by LongRoPE."""

from typing import Any

from workers.checkpoint import Config
from workers.layers.rotary import read_rope
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, read_heads, with_one_window

PHI3: dict[str, Any] = COMMON | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
OLD_KINDS = ("su", "yarn")  # what LongRoPE was called in Phi 3's first checkpoints


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(PHI3)
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(key)
    if isinstance(values, dict) and values.get("rope_type", values.get("type")) in OLD_KINDS:
        values = values | {"rope_type": "longrope"}
    config = Config(config.values | {key: values}, config.source)
    longest = config.integer("max_position_embeddings")
    rope = read_rope(config, read_heads(config).size, longest, partial=True)
    traits = read_decoder(config, {"sliding_window", "partial_rotary_factor"}, rope=rope)
    return with_one_window(config, traits)
