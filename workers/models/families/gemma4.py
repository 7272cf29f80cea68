"""Gemma 4: two kinds of heads, per-layer embeddings, and layers that share keys and values."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.layers.attention import Heads, QKNorm
from workers.layers.experts import ExpertTraits
from workers.layers.rotary import FULL, WINDOW, read_layer_ropes
from workers.layers.routing import Routing
from workers.models.decoder import DecoderTraits, LayerTraits, PerLayerTraits
from workers.models.families.gemma import GEMMA3, LOGITS_CAP, NORMS
from workers.models.families.llama import read_decoder, read_heads, read_kinds
from workers.models.families.moe import read_chosen

GEMMA4: dict[str, Any] = GEMMA3 | {
    "vocab_size": 262_144,
    "num_hidden_layers": 30,
    "sliding_window": 512,
    "global_head_dim": 512,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "rope_parameters": {
        WINDOW: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "query_pre_attn_scalar": None,
}
HONOURED = {
    "attention_bias", "sliding_window", "use_bidirectional_attention", "num_experts", LOGITS_CAP,
}  # fmt: skip


def read_traits(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(GEMMA4)
    # Images attend to all of themselves, and there are none in a text.
    if config.get("use_bidirectional_attention", "vision") != "vision":
        raise config.error("use_bidirectional_attention", "is not supported; allowed: vision")
    longest = config.integer("max_position_embeddings")
    ropes = read_layer_ropes(config, read_heads(config).size, longest)
    mixture = config.boolean("enable_moe_block", False)
    traits = read_decoder(config, HONOURED, rope=ropes[WINDOW], activation="hidden_activation")
    implied = [FULL if i % 6 == 5 else WINDOW for i in range(traits.num_layers)]
    kinds = [*read_kinds(config, implied, choose=True)[:-1], FULL]
    wide = _wide_heads(config, traits.heads, [i for i, kind in enumerate(kinds) if kind == FULL])
    ropes[FULL] = read_layer_ropes(config, wide.size, longest)[FULL]
    window, alike = config.integer("sliding_window"), config.boolean("attention_k_eq_v", False)
    experts = _experts(config) if mixture else None
    of_kind = {
        WINDOW: LayerTraits(ropes[WINDOW], window, experts),
        FULL: LayerTraits(ropes[FULL], None, experts, heads=wide, values_from_keys=alike),
    }
    return replace(
        traits,
        layers=_shared(config, traits, kinds, [of_kind[kind] for kind in kinds]),
        max_position=longest,
        norms=NORMS,
        qk_norm=QKNorm(traits.norm_eps),
        value_norm=True,
        attention_scale=1.0,
        embedding_scale=traits.hidden_size**0.5,
        logits_cap=config.number(LOGITS_CAP) if LOGITS_CAP in config else None,
        experts_beside=mixture,
        per_layer=_per_layer(config, traits.vocab_size),
        layer_scales=True,
    )


def _wide_heads(config: Config, heads: Heads, full: list[int]) -> Heads:
    """Those of the ``full`` layers, without a window: by fields of their own or, as transformers 5
    writes it, by an object for each of these layers."""
    size, kv_count = config.integer("global_head_dim"), heads.kv_count
    if config.boolean("attention_k_eq_v", False):
        kv_count = config.integer("num_global_key_value_heads", kv_count)
    if given := config.get("per_layer_config"):
        layers = {str(key).lstrip("0") or "0" for key in given} if isinstance(given, dict) else {}
        values = list(given.values()) if layers == {str(i) for i in full} else []
        alike = all(isinstance(value, dict) and value == values[0] for value in values)
        if not values or not alike or values[0].keys() - {"head_dim", "num_key_value_heads"}:
            allowed = f"an object of head_dim and num_key_value_heads, alike, for layers {full}"
            raise config.error("per_layer_config", f"must hold {allowed}")
        found = Config(values[0], f"{config.source}: per_layer_config")
        size = found.integer("head_dim", heads.size)
        kv_count = found.integer("num_key_value_heads", heads.kv_count)
    if heads.count % kv_count:
        raise config.error("num_global_key_value_heads", f"must divide {heads.count}")
    return Heads(heads.count, kv_count, size)


def _shared(
    config: Config, traits: DecoderTraits, kinds: list[str], layers: list[LayerTraits]
) -> tuple[LayerTraits, ...]:
    """``layers``, of which the last ``num_kv_shared_layers`` share the keys and values of the last
    one of their kind before these."""
    first = max(0, len(layers) - config.whole("num_kv_shared_layers", 0))
    owners = {kind: i for i, kind in enumerate(kinds[:first])}
    if owners.keys() != set(kinds):
        raise config.error("num_kv_shared_layers", "leaves no layer of a kind to share from")
    inner = traits.intermediate_size * (2 if config.boolean("use_double_wide_mlp", False) else 1)
    return tuple(
        layer if i < first else replace(layer, shares=owners[kinds[i]], inner=inner)
        for i, layer in enumerate(layers)
    )


def _per_layer(config: Config, vocab_size: int) -> PerLayerTraits | None:
    if not config.get("hidden_size_per_layer_input"):
        return None
    known = config.integer("vocab_size_per_layer_input")
    if known < vocab_size:
        raise config.error("vocab_size_per_layer_input", f"must be at least {vocab_size}")
    return PerLayerTraits(known, config.integer("hidden_size_per_layer_input"))


def _experts(config: Config) -> ExpertTraits:
    count, inner = config.integer("num_experts"), config.integer("moe_intermediate_size")
    chosen, scales = read_chosen(config, count, "top_k_experts"), "router.per_expert_scale"
    routing = Routing(chosen, normed=True, name="router.proj", expert_scales=scales)
    return ExpertTraits(count, inner, routing, activation="gelu_tanh")
