"""BERT (arXiv 1810.04805) and its kin RoBERTa and XLM-RoBERTa: encoders, whose tokens see all of
their prompt. They make vectors, and no tokens."""

import re
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
from workers.layers.embedding import PositionEmbedding, VocabEmbedding
from workers.layers.mlp import MLP
from workers.layers.norm import LayerNorm
from workers.layers.stream import Stream
from workers.models.base import Model, Traits, kept, refuse_foreign, whole_place
from workers.parallel import Place, Stage
from workers.weights import Parameter

# What transformers' config classes take where config.json leaves a field out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 1,
}
OWN_DEFAULTS = {"roberta": {"vocab_size": 50265}}
_OURS = (  # a checkpoint's names within a layer, and those of the layers here
    (".attention.self.query.", ".self_attn.q_proj."),
    (".attention.self.key.", ".self_attn.k_proj."),
    (".attention.self.value.", ".self_attn.v_proj."),
    (".attention.output.dense.", ".self_attn.out_proj."),
    (".intermediate.dense.", ".fc1."),
    (".output.dense.", ".fc2."),
)


@dataclass(frozen=True, kw_only=True)
class BertTraits(Traits):
    """``position_offset``: the row of the position table that the first position has."""

    intermediate_size: int
    token_types: int
    position_offset: int
    norm_eps: float


def read_traits(config: Config) -> BertTraits:
    """The traits that config.json describes. Raises CheckpointError, naming the field."""
    own = OWN_DEFAULTS.get(str(config.get("model_type")), {})
    config = Config(DEFAULTS | own | config.values, config.source)
    refuse_foreign(config)
    config.choice("hidden_act", "gelu", ("gelu",))
    config.choice("position_embedding_type", "absolute", ("absolute",))
    if config.boolean("is_decoder", False):
        raise config.error("is_decoder", "is not supported for this architecture")
    hidden, count = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % count:
        raise config.error("num_attention_heads", f"must divide hidden_size ({hidden})")
    # RoBERTa counts positions from the padding token's id on.
    offset = 0 if config.get("model_type") == "bert" else config.integer("pad_token_id") + 1
    return BertTraits(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=Heads(count, count, hidden // count),
        max_position=config.integer("max_position_embeddings") - offset,
        tied=False,
        generates=False,
        causal=False,
        intermediate_size=config.integer("intermediate_size"),
        token_types=config.integer("type_vocab_size"),
        position_offset=offset,
        norm_eps=config.number("layer_norm_eps"),
    )


class BertLayer:
    """h = norm(h + attention(h)), then h = norm(h + mlp(h))."""

    def __init__(
        self, traits: BertTraits, place: Place, index: int, backend: AttentionBackend
    ) -> None:
        name, hidden, eps = f"encoder.layer.{index}", traits.hidden_size, traits.norm_eps
        self._attention = Attention(
            place,
            f"{name}.self_attn",
            hidden,
            traits.heads,
            backend,
            output="out_proj",
            qkv_bias=True,
            output_bias=True,
        )
        self.memory = self._attention.memory
        self._attention_norm = LayerNorm(
            place, f"{name}.attention.output.LayerNorm", hidden, eps, affine=True
        )
        self._mlp = MLP(place, name, hidden, traits.intermediate_size, True, "gelu")
        self._mlp_norm = LayerNorm(place, f"{name}.output.LayerNorm", hidden, eps, affine=True)

    def parameters(self) -> Iterable[Parameter]:
        parts = (self._attention, self._attention_norm, self._mlp, self._mlp_norm)
        return chain.from_iterable(part.parameters() for part in parts)

    def __call__(
        self, hidden: Tensor, batch: Batch, cache: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        y = self._attention(hidden, batch, cache)
        hidden = self._attention_norm(self._attention.output(*kept(y, hidden, keep)))
        return self._mlp_norm(self._mlp(hidden, hidden))


class TypeEmbedding:
    """Token types [types, size], of which every token of a single text has the first."""

    def __init__(self, place: Place, name: str, types: int, size: int) -> None:
        shape = (types, size)
        self._table = torch.empty(shape, dtype=place.dtype, device=place.device)
        self._parameters = [Parameter(f"{name}.weight", shape, self._table)]

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self) -> Tensor:
        return self._table[0]


class BertModel(Model):
    """See ``Model``. The positions are the checkpoint's own table, whatever ``max_length``."""

    def __init__(
        self,
        traits: BertTraits,
        place: Place,
        stage: Stage,
        backend: AttentionBackend,
        max_length: int,
    ) -> None:
        super().__init__(place, stage)
        self._traits = traits
        self._backend = backend
        self._words: VocabEmbedding | None = None
        hidden, vocab = traits.hidden_size, traits.vocab_size
        if stage.first:
            positions, offset = traits.max_position, traits.position_offset
            name = "embeddings"
            self._words = VocabEmbedding(place, f"{name}.word_embeddings", vocab, hidden)
            self._positions = PositionEmbedding(
                place, f"{name}.position_embeddings", positions, offset, hidden
            )
            self._types = TypeEmbedding(
                place, f"{name}.token_type_embeddings", traits.token_types, hidden
            )
            self._norm = LayerNorm(place, f"{name}.LayerNorm", hidden, traits.norm_eps, affine=True)
            self.parts.extend([self._words, self._positions, self._types, self._norm])
        self._layers = [
            BertLayer(traits, place, i, backend) for i in range(stage.start, stage.stop)
        ]
        self.parts.extend(self._layers)
        self.layers = self._layers

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: list[Tensor], hidden: Tensor | None = None) -> Tensor:
        if self._words is not None:
            words = self._words(batch.tokens) + self._types()
            hidden = self._norm(Stream(words + self._positions(batch.positions)))
        assert hidden is not None and len(caches) == len(self._layers)
        for layer, cache in zip(self._layers, caches, strict=True):
            hidden = layer(hidden, batch, cache, self.keep(layer, batch))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        raise AssertionError("an encoder has no output layer")

    def whole(self) -> "BertModel":
        stage = Stage.whole(self._traits.num_layers)
        return BertModel(self._traits, whole_place(self.place), stage, self._backend, 1)

    def canonical(self, name: str) -> str | None:
        name = re.sub(r"^(bert|roberta)\.", "", name)
        if name.endswith("position_ids") or name.startswith(("pooler.", "cls.", "lm_head.")):
            return None  # of training, or no parameter
        for theirs, ours in _OURS:
            if theirs in name:
                return name.replace(theirs, ours)
        return name

    @property
    def tied(self) -> dict[str, str]:
        return {}
