"""The decoder that Llama's descendants share; families/ says which traits make which of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from workers.attention.base import AttentionBackend
from workers.batch import Batch
from workers.layers.attention import Attention, QKNorm
from workers.layers.delta_net import DeltaTraits, GatedDeltaNet
from workers.layers.embedding import LabelLayer, OutputLayer, VocabEmbedding
from workers.layers.experts import Experts, ExpertTraits
from workers.layers.linear import Gate
from workers.layers.mlp import GatedMLP
from workers.layers.norm import RMSNorm
from workers.layers.residual import Residual
from workers.layers.rotary import PositionScale, Rope, Rotary
from workers.layers.stream import Stream
from workers.models.base import Model, Traits, kept, whole_place
from workers.models.tensors import decoder_name, decoder_pieces, layer_of, text_name
from workers.parallel import Place, Stage
from workers.sweep import Sweep
from workers.weights import Parameter, Piece

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
LABELS = "score"


@dataclass(frozen=True)
class NormNames:
    """A layer's norms in front of attention and MLP and behind them; None: there is none."""

    attention: str | None = "input_layernorm"
    attention_output: str | None = None
    mlp: str | None = "post_attention_layernorm"
    mlp_output: str | None = None


BEHIND = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


@dataclass(frozen=True)
class LayerTraits:
    """What may differ from layer to layer. Without ``rope`` positions are not encoded; ``experts``
    take the MLP's place, ``delta`` attention's."""

    rope: Rope | None
    window: int | None = None
    experts: ExpertTraits | None = None
    delta: DeltaTraits | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderTraits(Traits):
    """The variations of the decoder; the defaults are Llama's.

    ``norm_offset`` is added to the norms' weights. Embeddings and updates of the residual stream
    are multiplied by their scales; logits are divided by ``logits_divisor``, then softly capped at
    ``logits_cap``. ``draft_layers`` follow the last in the checkpoint, to predict further tokens;
    they are not read.
    """

    intermediate_size: int
    norm_eps: float
    layers: tuple[LayerTraits, ...]
    activation: Gate = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norms: NormNames = NormNames()
    norm_offset: float = 0.0
    qk_norm: QKNorm | None = None
    gated_attention: bool = False
    query_scale: PositionScale | None = None
    sinks: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_cap: float | None = None
    draft_layers: int = 0

    @property
    def has_experts(self) -> bool:
        return any(layer.experts for layer in self.layers)

    @property
    def recurrent(self) -> bool:
        return any(layer.delta for layer in self.layers)


class DecoderLayer:
    """h += attention(h), then h += mlp(h), each with its norms."""

    def __init__(
        self,
        traits: DecoderTraits,
        place: Place,
        index: int,
        backend: AttentionBackend,
        rotary: Rotary | None,
        query_scales: Tensor | None,
    ) -> None:
        name, mine, names = f"model.layers.{index}", traits.layers[index], traits.norms
        self._attention_residual = self._residual(
            traits, place, name, names.attention, names.attention_output
        )
        self._attention: Attention | GatedDeltaNet
        if mine.delta is not None:
            self._attention = GatedDeltaNet(
                place, f"{name}.linear_attn", traits.hidden_size, mine.delta, traits.norm_eps
            )
        else:
            self._attention = Attention(
                place,
                f"{name}.self_attn",
                traits.hidden_size,
                traits.heads,
                backend,
                qkv_bias=traits.qkv_bias,
                output_bias=traits.output_bias,
                norm=traits.qk_norm,
                window=mine.window,
                rotary=rotary,
                query_scales=query_scales,
                sinks=traits.sinks,
                gated=traits.gated_attention,
            )
        self.memory = self._attention.memory
        self._mlp_residual = self._residual(traits, place, name, names.mlp, names.mlp_output)
        self._mlp: GatedMLP | Experts
        if mine.experts is not None:
            self._mlp = Experts(place, f"{name}.mlp", traits.hidden_size, mine.experts)
        else:
            self._mlp = GatedMLP(
                place,
                f"{name}.mlp",
                traits.hidden_size,
                traits.intermediate_size,
                traits.mlp_bias,
                traits.activation,
            )

    @staticmethod
    def _residual(
        traits: DecoderTraits, place: Place, name: str, before: str | None, after: str | None
    ) -> Residual:
        size, eps, offset = traits.hidden_size, traits.norm_eps, traits.norm_offset
        norms = [
            None if which is None else RMSNorm(place, f"{name}.{which}", size, eps, offset)
            for which in (before, after)
        ]
        return Residual(norms[0], norms[1], traits.residual_scale)

    def parameters(self) -> Iterable[Parameter]:
        parts = (self._attention_residual, self._attention, self._mlp_residual, self._mlp)
        return chain.from_iterable(part.parameters() for part in parts)

    def __call__(
        self, stream: Stream, batch: Batch, cache: Tensor, keep: Tensor | None = None
    ) -> Stream:
        x, residual = self._attention_residual.enter(stream)
        y = self._attention(x, batch, cache)
        y, residual = kept(y, residual, keep)
        stream = self._attention_residual.leave(self._attention.output, y, residual)
        return self._mlp_residual.leave(self._mlp, *self._mlp_residual.enter(stream))


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
        self._embedding_scale = float(torch.tensor(traits.embedding_scale, dtype=place.dtype))
        mine = traits.layers[stage.start : stage.stop]
        self._taps = next((layer.delta.taps for layer in mine if layer.delta), 0)
        ropes = [layer.rope for layer in mine]
        tables = {rope: Rotary(rope, max_length, place) for rope in set(ropes) if rope is not None}
        scale = traits.query_scale
        scales = None if scale is None else scale.table(max_length, place)
        self._layers = [
            DecoderLayer(traits, place, i, backend, tables.get(rope) if rope else None, scales)
            for i, rope in enumerate(ropes, stage.start)
        ]
        self.parts.extend(self._layers)
        self.layers = self._layers
        if stage.last:
            self._norm = RMSNorm(place, "model.norm", hidden, traits.norm_eps, traits.norm_offset)
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
            if self._embedding_scale != 1:
                hidden *= self._embedding_scale
        assert hidden is not None and len(caches) == len(self._layers)
        if self._taps:
            batch = replace(batch, sweep=Sweep(batch, self._taps))
        stream = Stream(hidden)
        for layer, cache in zip(self._layers, caches, strict=True):
            stream = layer(stream, batch, cache, self.keep(layer, batch))
        return self._norm(stream) if self.stage.last else stream.total()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        logits, cap = self._head(hidden), self._traits.logits_cap
        if self._traits.logits_divisor != 1:
            logits = logits / self._traits.logits_divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.inference_mode()
    def pooled(self, vectors: Tensor) -> Tensor:
        return self._labels(vectors) if self._traits.labels else vectors

    def whole(self) -> "DecoderModel":
        stage = Stage.whole(self._traits.num_layers)
        return DecoderModel(self._traits, whole_place(self.place), stage, self._backend, 1)

    def canonical(self, name: str) -> str | None:
        if self._traits.text_part:
            text = text_name(name)
            if text is None:
                return None
            name = text
        if name.startswith(f"{HEAD}.") and not self._traits.generates:
            return None
        last = self._traits.num_layers
        if last <= layer_of(name) < last + self._traits.draft_layers:
            return None
        return decoder_name(name)

    def pieces(self, name: str) -> list[Piece]:
        return decoder_pieces(name, self._traits)

    @property
    def tied(self) -> dict[str, str]:
        tied = self._traits.tied and self._traits.generates
        return {f"{HEAD}.weight": f"{EMBEDDING}.weight"} if tied else {}
