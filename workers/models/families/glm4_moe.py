"""GLM 4.5 and on: dense layers, then experts beside a shared one; half of a head is rotated."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import QKNorm
from workers.layers.rotary import read_rope
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, read_heads
from workers.models.families.moe import read_grouped, with_experts

GLM4_MOE: dict[str, Any] = COMMON | {
    "vocab_size": 151552,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "first_k_dense_replace": 1,
}
HONOURED = {"attention_bias", "partial_rotary_factor", "n_routed_experts", "use_qk_norm"}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GLM4_MOE)
    longest = config.integer("max_position_embeddings")
    rope = read_rope(config, read_heads(config).size, longest, partial=True)
    traits = read_decoder(config, HONOURED, rope=rope)
    normed = config.boolean("use_qk_norm", False)
    traits = replace(
        traits,
        output_bias=False,
        qk_norm=QKNorm(traits.norm_eps) if normed else None,
        draft_layers=config.whole("num_nextn_predict_layers", 1),
    )
    return with_experts(traits, read_grouped(config), config.whole("first_k_dense_replace", 1))
