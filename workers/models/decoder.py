"""The Llama family in one decoder: Llama, Mistral, Qwen2 and Qwen3, told apart by traits."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from workers.attention.base import AttentionBackend
from workers.batch import Batch
from workers.checkpoint import MOST_LAYERS, Config
from workers.layers.attention import Attention, Heads
from workers.layers.embedding import LabelLayer, OutputLayer, VocabEmbedding
from workers.layers.mlp import GatedMLP
from workers.layers.norm import RMSNorm
from workers.layers.rotary import Rope, Rotary, read_rope
from workers.layers.stream import Stream
from workers.models.base import Model, Traits, kept, refuse_foreign, whole_place
from workers.parallel import Place, Stage
from workers.weights import Parameter

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
LABELS = "score"
WINDOW = "sliding_attention"
FULL = "full_attention"

# What transformers' config classes take where config.json leaves a field out.
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _COMMON
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
HONOURED = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": {"sliding_window"},
    "qwen3": {"sliding_window", "attention_bias"},
}


@dataclass(frozen=True, kw_only=True)
class DecoderTraits(Traits):
    """The variations within the Llama family. ``windows`` has one entry for each layer."""

    intermediate_size: int
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norm: bool


def read_traits(config: Config) -> DecoderTraits:
    """The traits that config.json describes.

    Raises CheckpointError, naming the field, for what the family does not have.
    """
    family = str(config.get("model_type"))
    config = Config(DEFAULTS[family] | config.values, config.source)
    refuse_foreign(config, HONOURED[family])
    config.choice("hidden_act", "silu", ("silu", "swish"))
    hidden = config.integer("hidden_size")
    count = config.integer("num_attention_heads")
    kv_count = config.integer("num_key_value_heads", count)
    if count % kv_count:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads ({count})")
    if "head_dim" not in config and hidden % count:
        raise config.error("num_attention_heads", f"must divide hidden_size ({hidden})")
    heads = Heads(count, kv_count, config.integer("head_dim", hidden // count))
    rope = read_rope(config, heads.size, config.integer("max_position_embeddings"))
    attention_bias = config.boolean("attention_bias", False)
    return DecoderTraits(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        max_position=rope.longest,
        tied=config.boolean("tie_word_embeddings", False),
        intermediate_size=config.integer("intermediate_size"),
        norm_eps=config.number("rms_norm_eps"),
        rope=rope,
        windows=_windows(family, config),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=config.boolean("mlp_bias", False),
        head_norm=family == "qwen3",
    )


def _windows(family: str, config: Config) -> tuple[int | None, ...]:
    layers = config.integer("num_hidden_layers", most=MOST_LAYERS)
    window = config.integer("sliding_window") if "sliding_window" in config else None
    if family in ("qwen2", "qwen3") and not config.boolean("use_sliding_window", False):
        window = None
    if family == "mistral":
        kinds = [WINDOW if window else FULL] * layers
    else:
        first = config.values.get("max_window_layers", layers)
        if isinstance(first, bool) or not isinstance(first, int):
            raise config.error("max_window_layers", "must be an integer")
        kinds = [WINDOW if window and i >= first else FULL for i in range(layers)]
    given = config.get("layer_types", kinds)
    if (
        not isinstance(given, list)
        or len(given) != layers
        or any(kind not in (WINDOW, FULL) for kind in given)
    ):
        raise config.error("layer_types", f"must hold {layers} times {FULL} or {WINDOW}")
    if family in ("qwen2", "qwen3"):
        if WINDOW in given and window is None:
            raise config.error("layer_types", "needs use_sliding_window and sliding_window")
        kinds = given
    elif given != kinds:
        raise config.error("layer_types", f"must all be {kinds[0]} for {family}")
    return tuple(window if kind == WINDOW else None for kind in kinds)


class DecoderLayer:
    """h += attention(norm(h)), then h += mlp(norm(h))."""

    def __init__(
        self,
        traits: DecoderTraits,
        place: Place,
        index: int,
        backend: AttentionBackend,
        rotary: Rotary,
    ) -> None:
        name = f"model.layers.{index}"
        hidden, eps = traits.hidden_size, traits.norm_eps
        self._attention_norm = RMSNorm(place, f"{name}.input_layernorm", hidden, eps)
        self._attention = Attention(
            place,
            f"{name}.self_attn",
            hidden,
            traits.heads,
            backend,
            qkv_bias=traits.qkv_bias,
            output_bias=traits.output_bias,
            head_norm=eps if traits.head_norm else None,
            window=traits.windows[index],
            rotary=rotary,
        )
        self._mlp_norm = RMSNorm(place, f"{name}.post_attention_layernorm", hidden, eps)
        self._mlp = GatedMLP(
            place, f"{name}.mlp", hidden, traits.intermediate_size, traits.mlp_bias
        )

    def parameters(self) -> Iterable[Parameter]:
        parts = (self._attention_norm, self._attention, self._mlp_norm, self._mlp)
        return chain.from_iterable(part.parameters() for part in parts)

    def __call__(
        self, stream: Stream, batch: Batch, cache: Tensor, keep: Tensor | None = None
    ) -> Stream:
        y = self._attention(self._attention_norm(stream), batch, cache)
        stream = self._attention.output(*kept(y, stream.hidden, keep))
        return self._mlp(self._mlp_norm(stream), stream.hidden)


class DecoderModel(Model):
    """See ``Model``. ``max_length`` is the number of positions that will ever be used."""

    def __init__(
        self,
        traits: DecoderTraits,
        place: Place,
        stage: Stage,
        backend: AttentionBackend,
        max_length: int,
    ) -> None:
        super().__init__(place, stage)
        self._traits = traits
        self._backend = backend
        self._embedding: VocabEmbedding | None = None
        vocab, hidden = traits.vocab_size, traits.hidden_size
        if stage.first:
            self._embedding = VocabEmbedding(place, EMBEDDING, vocab, hidden)
            self.parts.append(self._embedding)
        rotary = Rotary(traits.rope, max_length, place)
        self._layers = [
            DecoderLayer(traits, place, i, backend, rotary) for i in range(stage.start, stage.stop)
        ]
        self.parts.extend(self._layers)
        self.layers = self._layers
        if stage.last:
            self._norm = RMSNorm(place, "model.norm", hidden, traits.norm_eps)
            self.parts.append(self._norm)
            if traits.generates:
                name = EMBEDDING if traits.tied else HEAD
                tied = self._embedding if traits.tied else None
                self._head = OutputLayer(place, name, vocab, hidden, tied)
                self.parts.append(self._head)
            if traits.labels:
                self._labels = LabelLayer(place, LABELS, hidden, traits.labels)
                self.parts.append(self._labels)

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: list[Tensor], hidden: Tensor | None = None) -> Tensor:
        if self._embedding is not None:
            hidden = self._embedding(batch.tokens)
        assert hidden is not None and len(caches) == len(self._layers)
        stream = Stream(hidden)
        for layer, cache in zip(self._layers, caches, strict=True):
            stream = layer(stream, batch, cache, self.keep(layer, batch))
        return self._norm(stream) if self.stage.last else stream.total()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    @torch.inference_mode()
    def pooled(self, vectors: Tensor) -> Tensor:
        return self._labels(vectors) if self._traits.labels else vectors

    def whole(self) -> "DecoderModel":
        stage = Stage.whole(self._traits.num_layers)
        return DecoderModel(self._traits, whole_place(self.place), stage, self._backend, 1)

    def canonical(self, name: str) -> str | None:
        # Written by old versions of transformers; computed from the config.
        if name.endswith("rotary_emb.inv_freq"):
            return None
        if name.startswith(f"{HEAD}.") and not self._traits.generates:
            return None
        # A checkpoint of the network without a head has no name for the whole.
        bare = name.startswith(("embed_tokens.", "layers.", "norm."))
        return f"model.{name}" if bare else name

    @property
    def tied(self) -> dict[str, str]:
        tied = self._traits.tied and self._traits.generates
        return {f"{HEAD}.weight": f"{EMBEDDING}.weight"} if tied else {}
