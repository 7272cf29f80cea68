"""OPT (arXiv 2205.01068), with the odd norm order and projections of its 350m size."""

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
from workers.layers.embedding import OutputLayer, PositionEmbedding, VocabEmbedding
from workers.layers.linear import Activation, ReplicatedLinear
from workers.layers.mlp import MLP
from workers.layers.norm import LayerNorm
from workers.layers.stream import Stream
from workers.models.base import Model, Traits, kept, refuse_foreign, whole_place
from workers.parallel import Place, Stage
from workers.weights import Parameter

DECODER = "model.decoder"
EMBEDDING = f"{DECODER}.embed_tokens"
HEAD = "lm_head"
NORM_EPS = 1e-5
POSITION_OFFSET = 2

# What transformers' OPTConfig takes where config.json leaves a field out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class OPTTraits(Traits):
    """The variations of OPT. ``embedding_size`` is the width of the token embeddings."""

    ffn_size: int
    embedding_size: int
    norm_before: bool
    final_norm: bool
    norm_affine: bool
    bias: bool
    activation: Activation


def read_traits(config: Config) -> OPTTraits:
    """The traits that config.json describes. Raises CheckpointError, naming the field."""
    config = Config(DEFAULTS | config.values, config.source)
    refuse_foreign(config)
    hidden, count = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % count:
        raise config.error("num_attention_heads", f"must divide hidden_size ({hidden})")
    activation = config.choice("activation_function", "relu", ("relu", "gelu"))
    norm_before = config.boolean("do_layer_norm_before", True)
    return OPTTraits(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=Heads(count, count, hidden // count),
        max_position=config.integer("max_position_embeddings"),
        tied=config.boolean("tie_word_embeddings", True),
        ffn_size=config.integer("ffn_dim"),
        embedding_size=config.integer("word_embed_proj_dim", hidden),
        norm_before=norm_before,
        final_norm=norm_before and not config.boolean("_remove_final_layer_norm", False),
        norm_affine=config.boolean("layer_norm_elementwise_affine", True),
        bias=config.boolean("enable_bias", True),
        activation="relu" if activation == "relu" else "gelu",
    )


class OPTLayer:
    """Attention and feed-forward, each with its norm before (or, for 350m, after) it."""

    def __init__(
        self, traits: OPTTraits, place: Place, index: int, backend: AttentionBackend
    ) -> None:
        name = f"{DECODER}.layers.{index}"
        hidden, affine = traits.hidden_size, traits.norm_affine
        self._norm_before = traits.norm_before
        self._attention = Attention(
            place,
            f"{name}.self_attn",
            hidden,
            traits.heads,
            backend,
            output="out_proj",
            qkv_bias=traits.bias,
            output_bias=traits.bias,
        )
        self.memory = self._attention.memory
        self._attention_norm = LayerNorm(
            place, f"{name}.self_attn_layer_norm", hidden, NORM_EPS, affine
        )
        self._mlp = MLP(place, name, hidden, traits.ffn_size, traits.bias, traits.activation)
        self._mlp_norm = LayerNorm(place, f"{name}.final_layer_norm", hidden, NORM_EPS, affine)

    def parameters(self) -> Iterable[Parameter]:
        parts = (self._attention, self._attention_norm, self._mlp, self._mlp_norm)
        return chain.from_iterable(part.parameters() for part in parts)

    def __call__(
        self, stream: Stream, batch: Batch, cache: Tensor, keep: Tensor | None = None
    ) -> Stream:
        x = self._attention_norm(stream) if self._norm_before else stream.hidden
        y = self._attention(x, batch, cache)
        stream = self._attention.output(*kept(y, stream.hidden, keep))
        if self._norm_before:
            return self._mlp(self._mlp_norm(stream), stream.hidden)
        hidden = self._attention_norm(stream)
        return Stream(self._mlp_norm(self._mlp(hidden, hidden)))


class OPTModel(Model):
    """See ``Model``. The positions are the checkpoint's own table, whatever ``max_length``."""

    def __init__(
        self,
        traits: OPTTraits,
        place: Place,
        stage: Stage,
        backend: AttentionBackend,
        max_length: int,
    ) -> None:
        assert max_length <= traits.max_position
        super().__init__(place, stage)
        self._traits = traits
        self._backend = backend
        self._embedding: VocabEmbedding | None = None
        self._projections: list[ReplicatedLinear] = []
        vocab, hidden, width = traits.vocab_size, traits.hidden_size, traits.embedding_size
        if stage.first:
            self._embedding = VocabEmbedding(place, EMBEDDING, vocab, width)
            self._positions = PositionEmbedding(
                place, f"{DECODER}.embed_positions", traits.max_position, POSITION_OFFSET, hidden
            )
            self.parts.extend([self._embedding, self._positions])
            self._project_in = self._projection("project_in", width, hidden)
        self._layers = [OPTLayer(traits, place, i, backend) for i in range(stage.start, stage.stop)]
        self.parts.extend(self._layers)
        self.layers = self._layers
        if stage.last:
            self._norm: LayerNorm | None = None
            if traits.final_norm:
                name = f"{DECODER}.final_layer_norm"
                self._norm = LayerNorm(place, name, hidden, NORM_EPS, traits.norm_affine)
                self.parts.append(self._norm)
            self._project_out = self._projection("project_out", hidden, width)
            name = EMBEDDING if traits.tied else HEAD
            tied = self._embedding if traits.tied else None
            self._head = OutputLayer(place, name, vocab, width, tied)
            self.parts.append(self._head)

    def _projection(self, name: str, inputs: int, outputs: int) -> ReplicatedLinear | None:
        if inputs == outputs:
            return None
        projection = ReplicatedLinear(self.place, f"{DECODER}.{name}", inputs, outputs)
        self.parts.append(projection)
        return projection

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: list[Tensor], hidden: Tensor | None = None) -> Tensor:
        if self._embedding is not None:
            hidden = self._embedding(batch.tokens)
            if self._project_in is not None:
                hidden = self._project_in(hidden)
            hidden = hidden + self._positions(batch.positions)
        assert hidden is not None and len(caches) == len(self._layers)
        stream = Stream(hidden)
        for layer, cache in zip(self._layers, caches, strict=True):
            stream = layer(stream, batch, cache, self.keep(layer, batch))
        if self.stage.last and self._norm is not None:
            return self._norm(stream)
        return stream.total()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        if self._project_out is not None:
            hidden = self._project_out(hidden)
        return self._head(hidden)

    def whole(self) -> "OPTModel":
        stage = Stage.whole(self._traits.num_layers)
        return OPTModel(self._traits, whole_place(self.place), stage, self._backend, 1)

    def canonical(self, name: str) -> str | None:
        if name.endswith("decoder.version"):  # metaseq's own mark
            return None
        return f"model.{name}" if name.startswith("decoder.") else name

    @property
    def tied(self) -> dict[str, str]:
        return {f"{HEAD}.weight": f"{EMBEDDING}.weight"} if self._traits.tied else {}
