"""Seed-OSS: Llama with biases of q, k and v, and one of the output that may differ."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder

SEED_OSS: dict[str, Any] = COMMON | {
    "vocab_size": 155136,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(SEED_OSS)
    traits = read_decoder(config, {"attention_bias", "attention_out_bias", "mlp_bias"})
    return replace(traits, output_bias=config.boolean("attention_out_bias", False))
