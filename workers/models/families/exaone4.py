"""Exaone 4: norms behind attention and MLP only, and of the heads of q and k. Where most layers
have a window, the others have no positions."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import QKNorm
from workers.layers.rotary import FULL, WINDOW
from workers.models.decoder import BEHIND, DecoderTraits
from workers.models.families.llama import COMMON, read_decoder, read_kinds, with_windows

EXAONE4: dict[str, Any] = COMMON | {
    "vocab_size": 102400,
    "intermediate_size": 16384,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(EXAONE4)
    traits = read_decoder(config, {"sliding_window"})
    traits = replace(traits, norms=BEHIND, qk_norm=QKNorm(traits.norm_eps))
    kinds = read_kinds(config, _pattern(config, traits.num_layers), choose=True)
    rope = traits.layers[0].rope
    hybrid = "sliding_window" in config
    return with_windows(config, traits, kinds, {WINDOW: rope, FULL: None if hybrid else rope})


def _pattern(config: Config, layers: int) -> list[str]:
    """Every n-th layer without a window for a pattern of n; L and G are layers with and without,
    over and over, the last layer always without."""
    pattern = config.get("sliding_window_pattern")
    if "sliding_window" not in config or not pattern:
        return [FULL] * layers
    if isinstance(pattern, str) and not set(pattern) - {"L", "G"}:
        kinds = [WINDOW if pattern[i % len(pattern)] == "L" else FULL for i in range(layers)]
        return [*kinds[:-1], FULL]
    if isinstance(pattern, str):
        raise config.error("sliding_window_pattern", "must be a number or hold L and G only")
    every = config.integer("sliding_window_pattern")
    return [WINDOW if (i + 1) % every else FULL for i in range(layers)]
