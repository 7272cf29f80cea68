"""Nemotron-H (arXiv 2504.03624) and Nemotron 3: a layer is a norm and one mixer, which is Mamba-2,
attention without positions, an MLP or experts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from typing import Any

import torch
from torch import Tensor

from workers.attention.base import AttentionBackend
from workers.batch import Batch
from workers.checkpoint import MOST_LAYERS, Config
from workers.layers import memory
from workers.layers.attention import Attention
from workers.layers.embedding import OutputLayer, VocabEmbedding
from workers.layers.experts import Experts, ExpertTraits, SharedExpert
from workers.layers.mamba2 import Mamba2, Mamba2Traits
from workers.layers.mlp import SquaredMLP
from workers.layers.norm import RMSNorm
from workers.layers.stream import Stream
from workers.models.base import Model, Traits, kept, refuse_foreign, whole_place
from workers.models.families.llama import read_heads
from workers.models.families.moe import read_grouped
from workers.models.tensors import convolution_pieces, layer_of, side_by_side
from workers.parallel import Place, Stage
from workers.sweep import Sweep
from workers.weights import Parameter, Piece

MAMBA, ATTENTION, MLP, MOE = "linear_attention", "full_attention", "mlp", "moe"
KINDS = {MAMBA: MAMBA, ATTENTION: ATTENTION, MLP: MLP, MOE: MOE}
KINDS |= {"mamba": MAMBA, "attention": ATTENTION}  # as older checkpoints say it
LETTERS = {"M": MAMBA, "*": ATTENTION, "-": MLP, "E": MOE}

# What transformers' NemotronHConfig takes where config.json leaves a field out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "intermediate_size": 21504,
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
}
# What fields may say that all published checkpoints leave alone.
ONLY: dict[str, tuple[Any, ...]] = {
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "residual_in_fp32": (False,),
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "time_step_limit": ([0.0, inf], [0.0, {"__float__": "Infinity"}]),  # as transformers 5 has it
    "n_shared_experts": (1,),
    "tie_word_embeddings": (False,),
}


@dataclass(frozen=True, kw_only=True)
class NemotronHTraits(Traits):
    """``kinds`` are the layers' mixers; ``mamba`` and ``experts`` are those of all layers that have
    them, None if there are none."""

    kinds: tuple[str, ...]
    norm_eps: float
    intermediate_size: int
    mamba: Mamba2Traits | None
    experts: ExpertTraits | None

    @property
    def has_experts(self) -> bool:
        return self.experts is not None

    @property
    def recurrent(self) -> bool:
        return self.mamba is not None


def read_traits(config: Config) -> NemotronHTraits:
    """The traits that config.json describes. Raises CheckpointError, naming the field."""
    config = config.over(DEFAULTS)
    refuse_foreign(config, {"n_routed_experts"})
    for field, allowed in ONLY.items():
        if config.get(field, allowed[0]) not in allowed:
            raise config.error(field, f"is not supported; it must be {allowed[0]}")
    kinds = _read_kinds(config)
    return NemotronHTraits(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_layers=len(kinds),
        heads=read_heads(config),
        max_position=config.integer("max_position_embeddings"),
        tied=False,
        kinds=kinds,
        norm_eps=config.number("layer_norm_epsilon"),
        intermediate_size=config.integer("intermediate_size"),
        mamba=_read_mamba(config) if MAMBA in kinds else None,
        experts=_read_experts(config) if MOE in kinds else None,
    )


def _read_kinds(config: Config) -> tuple[str, ...]:
    """Each layer's mixer, from ``layers_block_type`` or else ``hybrid_override_pattern``."""
    field, names = "layers_block_type", KINDS
    if field not in config:
        field, names = "hybrid_override_pattern", LETTERS
    given = config.get(field, "ME*-")
    if not isinstance(given, list if names is KINDS else str) or any(
        not isinstance(name, str) or name not in names for name in given
    ):
        raise config.error(field, f"must hold nothing but {', '.join(names)}")
    kinds = tuple(names[name] for name in given)
    if ATTENTION not in kinds:
        raise config.error(field, "must hold attention")
    layers = config.integer("num_hidden_layers", len(kinds), most=MOST_LAYERS)
    if layers != len(kinds):
        raise config.error("num_hidden_layers", f"must be the length of {field}, {len(kinds)}")
    return kinds


def _read_mamba(config: Config) -> Mamba2Traits:
    traits = Mamba2Traits(
        heads=config.integer("mamba_num_heads"),
        size=config.integer("mamba_head_dim"),
        groups=config.integer("n_groups"),
        state_size=config.integer("ssm_state_size"),
        taps=config.integer("conv_kernel"),
        conv_bias=config.boolean("use_conv_bias", True),
    )
    if traits.heads % traits.groups:
        raise config.error("n_groups", f"must divide mamba_num_heads ({traits.heads})")
    if traits.taps < 2:
        raise config.error("conv_kernel", "must be at least 2")
    return traits


def _read_experts(config: Config) -> ExpertTraits:
    shared = SharedExpert(config.integer("moe_shared_expert_intermediate_size"))
    latent = config.integer("moe_latent_size") if "moe_latent_size" in config else None
    return replace(read_grouped(config), shared=shared, gated=False, latent=latent)


class NemotronHLayer:
    """stream += mixer(norm(stream))."""

    def __init__(
        self, traits: NemotronHTraits, place: Place, index: int, backend: AttentionBackend
    ) -> None:
        name, hidden, kind = f"backbone.layers.{index}", traits.hidden_size, traits.kinds[index]
        mixer = f"{name}.mixer"
        self._norm = RMSNorm(place, f"{name}.norm", hidden, traits.norm_eps)
        self._mixer: Mamba2 | Attention | Experts | SquaredMLP
        self.memory = memory.nothing(place.device)
        if kind == MAMBA:
            assert traits.mamba is not None
            self._mixer = Mamba2(place, mixer, hidden, traits.mamba, traits.norm_eps)
            self.memory = self._mixer.memory
        elif kind == ATTENTION:
            self._mixer = Attention(place, mixer, hidden, traits.heads, backend)
            self.memory = self._mixer.memory
        elif kind == MOE:
            assert traits.experts is not None
            self._mixer = Experts(place, mixer, hidden, traits.experts)
        else:
            self._mixer = SquaredMLP(place, mixer, hidden, traits.intermediate_size)

    def parameters(self) -> Iterable[Parameter]:
        return chain(self._norm.parameters(), self._mixer.parameters())

    def __call__(
        self, stream: Stream, batch: Batch, cache: Tensor, keep: Tensor | None = None
    ) -> Stream:
        x = self._norm(stream)
        if isinstance(self._mixer, Experts | SquaredMLP):
            return self._mixer(*kept(x, stream.hidden, keep))
        y = self._mixer(x, batch, cache)
        return self._mixer.output(*kept(y, stream.hidden, keep))


class NemotronHModel(Model):
    """See ``Model``. No positions are encoded, whatever ``max_length``."""

    def __init__(
        self,
        traits: NemotronHTraits,
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
            self._embedding = VocabEmbedding(place, "backbone.embeddings", vocab, hidden)
            self.parts.append(self._embedding)
        numbers = range(stage.start, stage.stop)
        self._layers = [NemotronHLayer(traits, place, i, backend) for i in numbers]
        self.parts.extend(self._layers)
        self.layers = self._layers
        if stage.last:
            self._norm = RMSNorm(place, "backbone.norm_f", hidden, traits.norm_eps)
            self._head = OutputLayer(place, "lm_head", vocab, hidden, None)
            self.parts.extend([self._norm, self._head])

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: list[Tensor], hidden: Tensor | None = None) -> Tensor:
        if self._embedding is not None:
            hidden = self._embedding(batch.tokens)
        assert hidden is not None and len(caches) == len(self._layers)
        if self._traits.mamba is not None:
            batch = replace(batch, sweep=Sweep(batch, self._traits.mamba.taps))
        stream = Stream(hidden)
        for layer, cache in zip(self._layers, caches, strict=True):
            stream = layer(stream, batch, cache, self.keep(layer, batch))
        return self._norm(stream) if self.stage.last else stream.total()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def whole(self) -> "NemotronHModel":
        stage = Stage.whole(self._traits.num_layers)
        return NemotronHModel(self._traits, whole_place(self.place), stage, self._backend, 1)

    def canonical(self, name: str) -> str | None:
        if name.startswith("mtp."):  # of layers that draft further tokens
            return None
        # transformers 5 says "model" inside, and may write it.
        return re.sub(r"^model\.", "backbone.", name)

    def pieces(self, name: str) -> list[Piece]:
        module, _, leaf = name.rpartition(".")
        layer = layer_of(name.removeprefix("backbone."))
        kind = self._traits.kinds[layer] if 0 <= layer < self._traits.num_layers else None
        if kind == MAMBA:
            return self._mamba_pieces(module, leaf)
        if kind == MOE and module.endswith(".mixer.experts"):
            return self._expert_pieces(module, leaf)
        return []

    def _mamba_pieces(self, module: str, leaf: str) -> list[Piece]:
        """The projection, and the convolution."""
        mamba = self._traits.mamba
        assert mamba is not None
        if module.endswith(".mixer.in_proj"):
            names = [f"{module}_{part}.{leaf}" for part in mamba.projected]
            shape = (self._traits.hidden_size,)
            return side_by_side(names, list(mamba.projected.values()), (slice(None),), shape)
        if module.endswith(".mixer.conv1d"):
            widths = list(mamba.convolved.values())
            return convolution_pieces(module, mamba.convolved, leaf, widths, mamba.taps)
        return []

    def _expert_pieces(self, module: str, leaf: str) -> list[Piece]:
        """All experts in one tensor, as transformers 5 has them in memory."""
        experts = self._traits.experts
        assert experts is not None
        width = experts.latent or self._traits.hidden_size
        shape = (experts.inner, width) if leaf == "up_proj" else (width, experts.inner)
        return [
            Piece(
                f"{module}.{expert}.{leaf}.weight",
                (expert, slice(None), slice(None)),
                (experts.count, *shape),
            )
            for expert in range(experts.count)
        ]

    @property
    def tied(self) -> dict[str, str]:
        return {}
