"""Olmo 2 and 3: norms behind attention and MLP only, and of q and k over all heads; in Olmo 3 three
layers of four have a window."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import MOST_LAYERS, Config
from workers.layers.attention import QKNorm
from workers.layers.rotary import FULL, WINDOW, read_layer_ropes
from workers.models.decoder import BEHIND, DecoderTraits
from workers.models.families.llama import (
    COMMON,
    read_decoder,
    read_heads,
    read_kinds,
    with_windows,
)

OLMO2: dict[str, Any] = COMMON | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
OLMO3: dict[str, Any] = OLMO2 | {"rope_theta": 500_000.0, "sliding_window": 4096}


def read_olmo2(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    return _olmo(read_decoder(config.over(OLMO2), {"attention_bias"}))


def read_olmo3(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``. ``rope_scaling`` is for the layers without a window."""
    config = config.over(OLMO3)
    longest = config.integer("max_position_embeddings")
    ropes = read_layer_ropes(config, read_heads(config).size, longest)
    honoured = {"attention_bias", "sliding_window"}
    traits = _olmo(read_decoder(config, honoured, rope=ropes[FULL]))
    layers = config.integer("num_hidden_layers", most=MOST_LAYERS)
    implied = [WINDOW if (i + 1) % 4 else FULL for i in range(layers)]
    kinds = read_kinds(config, implied, choose=True)
    return with_windows(config, traits, kinds, dict(ropes))


def _olmo(traits: DecoderTraits) -> DecoderTraits:
    return replace(traits, norms=BEHIND, qk_norm=QKNorm(traits.norm_eps, wide=True))
