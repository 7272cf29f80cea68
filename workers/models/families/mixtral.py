"""Mixtral: experts in every layer."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.experts import ExpertTraits
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, with_one_window

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
    chosen = read_chosen(config, count)
    experts = ExpertTraits(count, chosen, traits.intermediate_size, normed=True)
    traits = with_one_window(config, traits)
    layers = tuple(replace(layer, experts=experts) for layer in traits.layers)
    return replace(traits, layers=layers)


def read_chosen(config: Config, count: int) -> int:
    """How many of ``count`` experts a token gets. Raises CheckpointError for more than all."""
    chosen = config.integer("num_experts_per_tok")
    if chosen > count:
        raise config.error("num_experts_per_tok", f"must be at most the number of experts, {count}")
    return chosen
