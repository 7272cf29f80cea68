"""Gemma 2 and 3: norms on both sides, their weights added to 1, soft caps; layers with a window
alternate with others and, in Gemma 3, have a rotary base of their own."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import QKNorm
from workers.layers.rotary import FULL, WINDOW, Rope, read_layer_ropes, read_rope
from workers.models.decoder import DecoderTraits, NormNames
from workers.models.families.llama import (
    COMMON,
    read_decoder,
    read_heads,
    read_kinds,
    with_windows,
)

LOGITS_CAP, ATTENTION_CAP = "final_logit_softcapping", "attn_logit_softcapping"
HONOURED = {"attention_bias", "sliding_window", "query_pre_attn_scalar", LOGITS_CAP}
GEMMA2: dict[str, Any] = COMMON | {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    LOGITS_CAP: 30.0,
    ATTENTION_CAP: 50.0,
}
GEMMA3: dict[str, Any] = GEMMA2 | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    LOGITS_CAP: None,
    ATTENTION_CAP: None,
}
NORMS = NormNames(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def read_gemma2(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GEMMA2)
    longest = config.integer("max_position_embeddings")
    rope = read_rope(config, read_heads(config).size, longest)
    cap = config.number(ATTENTION_CAP) if ATTENTION_CAP in config else None
    ropes = {FULL: rope, WINDOW: rope}
    traits = _gemma(config, HONOURED | {ATTENTION_CAP}, ropes, every=2)
    return replace(traits, attention_cap=cap)


def read_gemma3(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GEMMA3)
    longest, local = config.integer("max_position_embeddings"), "rope_local_base_freq"
    ropes = read_layer_ropes(config, read_heads(config).size, longest, config.number(local))
    traits = _gemma(config, HONOURED, ropes, config.integer("sliding_window_pattern", 6))
    # The scaling of the rotary embedding has led to this length; it does not multiply it.
    return replace(traits, max_position=longest, qk_norm=QKNorm(traits.norm_eps, offset=1.0))


def _gemma(config: Config, honoured: set[str], ropes: dict[str, Rope], every: int) -> DecoderTraits:
    """The traits of both; unless the config says which, ``every`` n-th layer has no window."""
    traits = read_decoder(config, honoured, rope=ropes[FULL], activation="hidden_activation")
    traits = replace(
        traits,
        norms=NORMS,
        norm_offset=1.0,
        embedding_scale=traits.hidden_size**0.5,
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        logits_cap=config.number(LOGITS_CAP) if LOGITS_CAP in config else None,
    )
    implied = [WINDOW if (i + 1) % every else FULL for i in range(traits.num_layers)]
    kinds = read_kinds(config, implied, choose=True)
    return with_windows(config, traits, kinds, dict(ropes))
