"""MiniMax M2: experts in every layer, chosen by the sigmoid; norms over all heads of q and of k."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import QKNorm
from workers.layers.experts import ExpertTraits
from workers.layers.rotary import read_rope
from workers.layers.routing import Routing
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, read_heads
from workers.models.families.moe import read_chosen, with_experts

MINIMAX_M2: dict[str, Any] = COMMON | {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 196608,
    "rope_theta": 5e6,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}
# What configs say of variants that no checkpoint has, and the only values that are known.
ONLY: dict[str, Any] = {
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
}
HONOURED = {"partial_rotary_factor", "num_local_experts", "use_qk_norm"}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(MINIMAX_M2)
    for field, only in ONLY.items():
        if config.get(field, only) != only:
            raise config.error(field, f"is not supported; allowed: {only}")
    heads, longest = read_heads(config), config.integer("max_position_embeddings")
    if "rotary_dim" in config:  # published checkpoints say it so
        config = config.over({"partial_rotary_factor": config.integer("rotary_dim") / heads.size})
    rope = read_rope(config, heads.size, longest, partial=True)
    traits = read_decoder(config, HONOURED, rope=rope)
    count = config.integer("num_local_experts")
    routing = Routing(
        read_chosen(config, count),
        scores="sigmoid",
        normed=True,
        precise=True,
        correction="e_score_correction_bias",
    )
    traits = replace(
        traits,
        qk_norm=QKNorm(traits.norm_eps, wide=True),
        draft_layers=config.whole("num_mtp_modules", 0),
    )
    return with_experts(traits, ExpertTraits(count, traits.intermediate_size, routing))
