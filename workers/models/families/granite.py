"""Granite 3: Llama with multipliers."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.models.decoder import DecoderTraits
from workers.models.families.llama import COMMON, read_decoder

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
GRANITE: dict[str, Any] = COMMON | dict.fromkeys((*MULTIPLIERS, "logits_scaling"), 1.0)


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GRANITE)
    honoured = {*MULTIPLIERS, "logits_scaling", "attention_bias", "mlp_bias"}
    return replace(
        read_decoder(config, honoured),
        embedding_scale=config.number("embedding_multiplier"),
        residual_scale=config.number("residual_multiplier"),
        attention_scale=config.number("attention_multiplier"),
        logits_divisor=config.number("logits_scaling"),
    )
