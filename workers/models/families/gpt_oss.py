"""gpt-oss: experts in every layer, windows in every other, attention sinks."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.experts import ClampedGate, ExpertTraits
from workers.layers.rotary import FULL, WINDOW
from workers.layers.routing import Routing
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, read_kinds, with_windows
from workers.models.families.moe import read_chosen, with_experts

GPT_OSS: dict[str, Any] = COMMON | {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GPT_OSS)
    if "rope_scaling" not in config and "rope_parameters" not in config:
        config = Config(config.values | {"rope_parameters": YARN}, config.source)
    traits = read_decoder(config, {"sliding_window", "attention_bias", "num_local_experts"})
    count = config.integer("num_local_experts")
    experts = ExpertTraits(
        count,
        traits.intermediate_size,
        Routing(read_chosen(config, count), scores="chosen", name="router", bias=True),
        gate=ClampedGate(config.number("swiglu_alpha"), config.number("swiglu_limit")),
        bias=True,
        interleaved=True,
    )
    implied = [FULL if i % 2 else WINDOW for i in range(traits.num_layers)]
    kinds = read_kinds(config, implied, choose=True)
    traits = with_windows(config, traits, kinds, dict.fromkeys(kinds, traits.layers[0].rope))
    return with_experts(replace(traits, sinks=True), experts)
