"""Mixtral: experts in every layer."""

from typing import Any

from workers.checkpoint import Config
from workers.layers.experts import ExpertTraits
from workers.layers.routing import Routing
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, with_one_window
from workers.models.families.moe import read_chosen, with_experts

MIXTRAL: dict[str, Any] = COMMON | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(MIXTRAL)
    traits = read_decoder(config, {"sliding_window", "num_local_experts"})
    count = config.integer("num_local_experts")
    routing = Routing(read_chosen(config, count), normed=True)
    experts = ExpertTraits(count, traits.intermediate_size, routing)
    return with_experts(with_one_window(config, traits), experts)
