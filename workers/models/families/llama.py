"""Llama, and what its descendants read alike."""

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

from workers.checkpoint import MOST_LAYERS, Config
from workers.layers.attention import Heads
from workers.layers.rotary import FULL, WINDOW, Rope, read_rope
from workers.models.base import refuse_foreign
from workers.models.decoder import DecoderTraits, LayerTraits

# What transformers' config classes take where config.json leaves a field out.
COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def read_traits(config: Config) -> DecoderTraits:
    """The traits that config.json describes.

    Raises CheckpointError, naming the field, for what the family does not have.
    """
    return read_decoder(config.over(COMMON), {"attention_bias", "mlp_bias"})


def read_decoder(
    config: Config,
    honoured: Set[str] = frozenset(),
    *,
    rope: Rope | None = None,
    activation: str = "hidden_act",
) -> DecoderTraits:
    """The traits of a Llama with the sizes, ``attention_bias`` and ``mlp_bias`` that ``config``
    has, every layer alike, for the family to alter.

    ``honoured`` are the fields that the family reads itself; ``rope`` is its rotary embedding where
    that is not as usual; ``activation`` is the field that names that of the MLP. Raises
    CheckpointError, naming the field, for what would change the mathematics.
    """
    refuse_foreign(config, honoured)
    if activation == "hidden_act":
        config.choice(activation, "silu", ("silu", "swish"))
    else:
        config.choice(activation, "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    heads = read_heads(config)
    rope = rope or read_rope(config, heads.size, config.integer("max_position_embeddings"))
    attention_bias = config.boolean("attention_bias", False)
    layers = config.integer("num_hidden_layers", most=MOST_LAYERS)
    if not honoured & {"layer_types", "sliding_window"}:
        read_kinds(config, [FULL] * layers, choose=False)
    return DecoderTraits(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_layers=layers,
        heads=heads,
        max_position=rope.longest,
        tied=config.boolean("tie_word_embeddings", False),
        intermediate_size=config.integer("intermediate_size"),
        norm_eps=config.number("rms_norm_eps"),
        layers=(LayerTraits(rope),) * layers,
        activation="silu" if activation == "hidden_act" else "gelu_tanh",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )


def read_heads(config: Config) -> Heads:
    """The attention heads. Raises CheckpointError, naming the field, if they do not add up."""
    hidden, count = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_count = config.integer("num_key_value_heads", count)
    if count % kv_count:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads ({count})")
    if "head_dim" not in config and hidden % count:
        raise config.error("num_attention_heads", f"must divide hidden_size ({hidden})")
    return Heads(count, kv_count, config.integer("head_dim", hidden // count))


def read_kinds(config: Config, implied: Sequence[str], choose: bool) -> list[str]:
    """Each layer's kind, with a window or without: ``layer_types``, or what is ``implied``.

    Raises CheckpointError if they are not of the right number and kinds, or, unless the checkpoint
    may ``choose``, not those implied.
    """
    given = config.get("layer_types", list(implied))
    if (
        not isinstance(given, list)
        or len(given) != len(implied)
        or any(kind not in (WINDOW, FULL) for kind in given)
    ):
        raise config.error("layer_types", f"must hold {len(implied)} times {FULL} or {WINDOW}")
    if not choose and given != list(implied):
        raise config.error("layer_types", f"must all be {implied[0]} here")
    return given


def with_one_window(config: Config, traits: DecoderTraits) -> DecoderTraits:
    """``traits`` with the ``sliding_window`` in every layer, if there is one."""
    kind = WINDOW if "sliding_window" in config else FULL
    kinds = read_kinds(config, [kind] * traits.num_layers, choose=False)
    return with_windows(config, traits, kinds, {kind: traits.layers[0].rope})


def with_windows(
    config: Config, traits: DecoderTraits, kinds: Sequence[str], ropes: dict[str, Rope | None]
) -> DecoderTraits:
    """``traits`` whose layers are of ``kinds``, each with its rotary embedding. Raises
    CheckpointError where a kind needs a ``sliding_window`` that is not there."""
    windows: dict[str, int | None] = {FULL: None}
    if WINDOW in kinds:
        windows[WINDOW] = config.integer("sliding_window")
    return replace(traits, layers=tuple(LayerTraits(ropes[kind], windows[kind]) for kind in kinds))
