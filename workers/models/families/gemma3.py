"""Gemma 3: norms on both sides, weights of norms that are added to 1, layers with a window that
have a rotary base of their own."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import QKNorm
from workers.layers.rotary import FULL, WINDOW, read_layer_ropes
from workers.models.decoder import DecoderTraits, NormNames
from workers.models.families.llama import (
    COMMON,
    read_decoder,
    read_heads,
    read_kinds,
    with_windows,
)

GEMMA3: dict[str, Any] = COMMON | {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
NORMS = NormNames(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GEMMA3)
    longest, local = config.integer("max_position_embeddings"), "rope_local_base_freq"
    ropes = read_layer_ropes(config, read_heads(config).size, longest, config.number(local))
    honoured = {
        "attention_bias",
        "sliding_window",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
    }
    traits = read_decoder(config, honoured, rope=ropes[FULL], activation="hidden_activation")
    cap = "final_logit_softcapping"
    traits = replace(
        traits,
        max_position=longest,  # what the scaling of the rotary embedding has led to
        norms=NORMS,
        norm_offset=1.0,
        qk_norm=QKNorm(traits.norm_eps, offset=1.0),
        embedding_scale=traits.hidden_size**0.5,
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        logits_cap=config.number(cap) if cap in config else None,
    )
    every = config.integer("sliding_window_pattern", 6)
    implied = [WINDOW if (i + 1) % every else FULL for i in range(traits.num_layers)]
    kinds = read_kinds(config, implied, choose=True)
    return with_windows(config, traits, kinds, dict(ropes))
