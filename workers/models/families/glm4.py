"""GLM 4: norms on both sides, and half of a head is rotated, by pairs of neighbours."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.rotary import read_rope
from workers.models.decoder import DecoderTraits, NormNames
from workers.models.families.llama import COMMON, read_decoder, read_heads

GLM4: dict[str, Any] = COMMON | {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
NORMS = NormNames(
    "input_layernorm",
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    "post_mlp_layernorm",
)


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GLM4)
    longest = config.integer("max_position_embeddings")
    rope = read_rope(config, read_heads(config).size, longest, partial=True)
    honoured = {"attention_bias", "partial_rotary_factor"}
    traits = read_decoder(config, honoured, rope=replace(rope, interleaved=True))
    return replace(traits, norms=NORMS, output_bias=False)
