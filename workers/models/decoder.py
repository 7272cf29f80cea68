"""The decoder that Llama's descendants share; families/ says which traits make which of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from engine.errors import ConfigError
from workers.attention.base import LayerAttention
from workers.attention.several import Backend, part_of
from workers.batch import Batch
from workers.layers.attention import Attention, Heads, QKNorm
from workers.layers.delta_net import DeltaTraits, GatedDeltaNet
from workers.layers.embedding import LabelLayer, OutputLayer, VocabEmbedding
from workers.layers.experts import Experts, ExpertTraits
from workers.layers.latent_attention import LatentAttention, LatentTraits
from workers.layers.linear import Gate
from workers.layers.mlp import GatedMLP
from workers.layers.mlp_beside_experts import MLPBesideExperts
from workers.layers.norm import RMSNorm
from workers.layers.per_layer import PerLayerBlock, PerLayerEmbedding
from workers.layers.residual import Residual
from workers.layers.rotary import PositionScale, Rope, Rotary
from workers.layers.stream import Stream
from workers.models.base import Layer, Model, Traits, kept, whole_place
from workers.models.tensors import decoder_name, decoder_pieces, layer_of, text_name
from workers.parallel import Place, Stage
from workers.sweep import Sweep
from workers.weights import Parameter, Piece

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
LABELS = "score"
UNSHARED = ("k_proj", "v_proj", "k_norm")  # which some checkpoints have in layers that share theirs


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
    take the MLP's place, ``delta`` attention's. ``heads`` and ``inner``, the MLP's units, are the
    model's unless given. A layer attends over the keys and values of the layer that it ``shares``,
    if it has none."""

    rope: Rope | None
    window: int | None = None
    experts: ExpertTraits | None = None
    delta: DeltaTraits | None = None
    heads: Heads | None = None
    inner: int | None = None
    values_from_keys: bool = False
    shares: int | None = None


@dataclass(frozen=True)
class PerLayerTraits:
    """Per-layer embeddings: ``size`` of a token's vector for a layer, known for ``vocab_size``
    ids."""

    vocab_size: int
    size: int


@dataclass(frozen=True, kw_only=True)
class DecoderTraits(Traits):
    """The variations of the decoder; the defaults are Llama's.

    ``norm_offset`` is added to the norms' weights. Embeddings and updates of the residual stream
    are multiplied by their scales; logits are divided by ``logits_divisor``, then softly capped at
    ``logits_cap``. ``experts_beside``: experts stand beside the MLP, not in its place.
    ``value_norm``: values have an RMS norm without weight; ``layer_scales``: what leaves a layer is
    multiplied by a number of its own. ``draft_layers`` follow the last in the checkpoint, to
    predict further tokens; they are not read.
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
    latents: LatentTraits | None = None
    experts_beside: bool = False
    value_norm: bool = False
    per_layer: PerLayerTraits | None = None
    layer_scales: bool = False
    draft_layers: int = 0

    @property
    def has_experts(self) -> bool:
        return any(layer.experts for layer in self.layers)

    @property
    def head_kinds(self) -> tuple[Heads, ...]:
        return tuple(dict.fromkeys(self.heads_of(layer) for layer in self.layers))

    def heads_of(self, layer: LayerTraits) -> Heads:
        """A layer's heads."""
        return layer.heads or self.heads

    @property
    def latent(self) -> int | None:
        return None if self.latents is None else self.latents.rank

    @property
    def recurrent(self) -> bool:
        return any(layer.delta for layer in self.layers)


class DecoderLayer:
    """h += attention(h), then h += mlp(h), each with its norms; then what is there per layer."""

    def __init__(
        self,
        traits: DecoderTraits,
        place: Place,
        index: int,
        backend: LayerAttention,
        rotary: Rotary | None,
        query_scales: Tensor | None,
    ) -> None:
        name, mine, names = f"model.layers.{index}", traits.layers[index], traits.norms
        self._attention_residual = self._residual(
            traits, place, name, names.attention, names.attention_output
        )
        self._attention = _make_attention(traits, place, name, mine, backend, rotary, query_scales)
        self.memory = self._attention.memory
        before = None if traits.experts_beside else names.mlp
        self._mlp_residual = self._residual(traits, place, name, before, names.mlp_output)
        self._mlp: GatedMLP | Experts | MLPBesideExperts
        if mine.experts is not None and traits.experts_beside:
            self._mlp = MLPBesideExperts(
                place,
                name,
                traits.hidden_size,
                mine.inner or traits.intermediate_size,
                traits.activation,
                traits.norm_eps,
                mine.experts,
            )
        elif mine.experts is not None:
            self._mlp = Experts(place, f"{name}.mlp", traits.hidden_size, mine.experts)
        else:
            self._mlp = GatedMLP(
                place,
                f"{name}.mlp",
                traits.hidden_size,
                mine.inner or traits.intermediate_size,
                traits.mlp_bias,
                traits.activation,
            )
        self._per_layer: PerLayerBlock | None = None
        if traits.per_layer is not None:
            size = traits.per_layer.size
            self._per_layer = PerLayerBlock(place, name, traits.hidden_size, size, traits.norm_eps)
        self._scale: Tensor | None = None
        if traits.layer_scales:
            self._scale = torch.empty(1, dtype=place.dtype, device=place.device)
            self._scale_parameter = Parameter(f"{name}.layer_scalar", (1,), self._scale)

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
        parts: list[Layer] = [self._attention_residual, self._attention]
        parts += [self._mlp_residual, self._mlp]
        parts += [] if self._per_layer is None else [self._per_layer]
        scale = [] if self._scale is None else [self._scale_parameter]
        return chain(scale, *(part.parameters() for part in parts))

    def __call__(
        self,
        stream: Stream,
        batch: Batch,
        cache: Tensor,
        keep: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Stream:
        """The stream behind the layer; of ``keep``, if given, alone. ``vectors`` [T, size] are its
        per-layer embeddings."""
        x, residual = self._attention_residual.enter(stream)
        y = self._attention(x, batch, cache)
        y, residual = kept(y, residual, keep)
        stream = self._attention_residual.leave(self._attention.output, y, residual)
        stream = self._mlp_residual.leave(self._mlp, *self._mlp_residual.enter(stream))
        if self._per_layer is not None and vectors is not None:
            stream = self._per_layer(stream, vectors if keep is None else vectors[keep])
        return stream if self._scale is None else Stream(stream.total() * self._scale)


def _make_attention(
    traits: DecoderTraits,
    place: Place,
    name: str,
    mine: LayerTraits,
    backend: LayerAttention,
    rotary: Rotary | None,
    query_scales: Tensor | None,
) -> Attention | GatedDeltaNet | LatentAttention:
    """The attention of layer ``name``, whose traits are ``mine``."""
    hidden = traits.hidden_size
    if mine.delta is not None:
        return GatedDeltaNet(place, f"{name}.linear_attn", hidden, mine.delta, traits.norm_eps)
    name = f"{name}.self_attn"
    if traits.latents is not None:
        assert rotary is not None
        return LatentAttention(
            place,
            name,
            hidden,
            traits.heads.count,
            traits.latents,
            backend,
            bias=traits.qkv_bias,
            rotary=rotary,
        )
    return Attention(
        place,
        name,
        hidden,
        traits.heads_of(mine),
        backend,
        qkv_bias=traits.qkv_bias,
        output_bias=traits.output_bias,
        norm=traits.qk_norm,
        window=mine.window,
        rotary=rotary,
        query_scales=query_scales,
        gated=traits.gated_attention,
        sinks=traits.sinks,
        value_norm=traits.norm_eps if traits.value_norm else None,
        from_keys=mine.values_from_keys,
        shares=mine.shares is not None,
    )


class DecoderModel(Model):
    """See ``Model``. ``max_length`` is the number of positions that will ever be used."""

    def __init__(
        self,
        traits: DecoderTraits,
        place: Place,
        stage: Stage,
        backend: Backend,
        max_length: int,
    ) -> None:
        super().__init__(place, stage)
        _check_stage(traits, stage)
        self._traits = traits
        self._backend = backend
        self._embedding: VocabEmbedding | None = None
        vocab, hidden = traits.vocab_size, traits.hidden_size
        if stage.first:
            self._embedding = VocabEmbedding(place, EMBEDDING, vocab, hidden)
            self.parts.append(self._embedding)
        self._per_layer: PerLayerEmbedding | None = None
        if traits.per_layer is not None:
            self._per_layer = PerLayerEmbedding(
                place,
                traits.per_layer.vocab_size,
                hidden,
                traits.num_layers,
                traits.per_layer.size,
                traits.norm_eps,
            )
            self.parts.append(self._per_layer)
        self._embedding_scale = float(torch.tensor(traits.embedding_scale, dtype=place.dtype))
        mine = traits.layers[stage.start : stage.stop]
        self._taps = next((layer.delta.taps for layer in mine if layer.delta), 0)
        ropes = [layer.rope for layer in mine]
        tables = {rope: Rotary(rope, max_length, place) for rope in set(ropes) if rope is not None}
        scale = traits.query_scale
        scales = None if scale is None else scale.table(max_length, place)
        kinds = [traits.head_kinds.index(traits.heads_of(layer)) for layer in traits.layers]
        self._layers = [
            DecoderLayer(
                traits,
                place,
                i,
                part_of(backend, kinds[i]),
                tables.get(rope) if rope else None,
                scales,
            )
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
        vectors = None
        if self._per_layer is not None:
            vectors = self._per_layer(batch.tokens, hidden)
        stream, start = Stream(hidden), self.stage.start
        for i, layer in enumerate(self._layers):
            shares = self._traits.layers[start + i].shares
            cache = caches[i if shares is None else shares - start]
            own = None if vectors is None else vectors[:, i]
            stream = layer(stream, batch, cache, self.keep(layer, batch), own)
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
        layer, last = layer_of(name), self._traits.num_layers
        if last <= layer < last + self._traits.draft_layers:
            return None
        shares = 0 <= layer < last and self._traits.layers[layer].shares is not None
        if shares and name.split(".")[-2] in UNSHARED:
            return None
        return decoder_name(name)

    def pieces(self, name: str) -> list[Piece]:
        return decoder_pieces(name, self._traits)

    @property
    def tied(self) -> dict[str, str]:
        tied = self._traits.tied and self._traits.generates
        return {f"{HEAD}.weight": f"{EMBEDDING}.weight"} if tied else {}


def _check_stage(traits: DecoderTraits, stage: Stage) -> None:
    """Raise ConfigError if a layer of the stage needs what only another stage has."""
    if traits.per_layer is not None and not (stage.first and stage.last):
        raise ConfigError(
            "pipeline_parallel_size must be 1: each layer of this model needs embeddings of the"
            " tokens, which the first stage alone knows"
        )
    for i in range(stage.start, stage.stop):
        shared = traits.layers[i].shares
        if shared is not None and shared < stage.start:
            raise ConfigError(
                f"pipeline_partition: layer {i} shares the keys and values of layer {shared}, which"
                " must be in the same stage"
            )
