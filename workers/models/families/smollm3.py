"""SmolLM 3: every fourth layer has no positions."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import MOST_LAYERS, Config
from workers.layers.rotary import FULL, WINDOW
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, read_kinds

SMOLLM3: dict[str, Any] = COMMON | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 2e6,
}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(SMOLLM3)
    honoured = {"attention_bias", "mlp_bias", "sliding_window", "no_rope_layers"}
    traits = read_decoder(config, honoured)
    rotated = _rotated(config)
    window = None
    if config.boolean("use_sliding_window", False) and "sliding_window" in config:
        window = config.integer("sliding_window")
    implied = [FULL if window is None or has else WINDOW for has in rotated]
    kinds = read_kinds(config, implied, choose=True)
    layers = zip(traits.layers, rotated, kinds, strict=True)
    return replace(
        traits,
        layers=tuple(
            replace(
                layer, rope=layer.rope if has else None, window=window if kind == WINDOW else None
            )
            for layer, has, kind in layers
        ),
    )


def _rotated(config: Config) -> list[bool]:
    """Which layers have positions: 1 in ``no_rope_layers``."""
    count = config.integer("num_hidden_layers", most=MOST_LAYERS)
    interval = config.integer("no_rope_layer_interval", 4)
    given = config.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(count)])
    if (
        not isinstance(given, list)
        or len(given) < count
        or any(isinstance(has, bool) or has not in (0, 1) for has in given)
    ):
        raise config.error("no_rope_layers", f"must hold {count} times 0 or 1")
    return [has == 1 for has in given[:count]]
