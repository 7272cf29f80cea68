"""What every model shares: its traits, read from config.json, and its interface."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.attention.base import AttentionShape
from workers.batch import Batch
from workers.checkpoint import Config
from workers.layers.attention import Heads
from workers.layers.memory import Memory
from workers.parallel import Place, Stage
from workers.weights import Parameter, Piece

# Fields of other networks that change the mathematics, and the values that leave it alone.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleaved": (False,),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "kv_lora_rank": (),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_chunk_size": (),
    "sliding_window": (),
    "no_rope_layers": ([],),
    "cross_attention_layers": ([],),
    "clip_qkv": (),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "text_config": (),
    "vision_config": (),
    "use_bidirectional_attention": (False,),
    "attention_out_bias": (False,),
}


def refuse_foreign(config: Config, honoured: Iterable[str] = ()) -> None:
    """Raise CheckpointError for a field that would change the mathematics and is not honoured."""
    for field, neutral in NEUTRAL.items():
        if field in config and field not in honoured and config.get(field) not in neutral:
            raise config.error(field, "is not supported for this architecture")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the rest of the system must know of a model, whatever its network.

    ``max_position`` is the longest context in tokens that the checkpoint is meant for; ``tied``
    says that the output layer shares the token embeddings. A model ``generates`` if it has an
    output layer; a classifier has ``labels`` in its place, and an embedding model neither. If it is
    not ``causal`` a token sees those after it, so that a prompt is computed in one piece.

    ``attention_scale`` multiplies q · k; None: 1 / √(head size). ``attention_cap`` is a soft cap of
    that. ``text_part``: the checkpoint has other parts beside the text model, whose tensors mean
    nothing here.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    heads: Heads
    max_position: int
    tied: bool
    generates: bool = True
    labels: int = 0
    causal: bool = True
    attention_scale: float | None = None
    attention_cap: float | None = None
    text_part: bool = False

    @property
    def has_experts(self) -> bool:
        return False

    @property
    def head_kinds(self) -> tuple[Heads, ...]:
        """``heads``, and those of layers that have others."""
        return (self.heads,)

    @property
    def recurrent(self) -> bool:
        """Whether any layer keeps a state of each sequence."""
        return False

    @property
    def latent(self) -> int | None:
        """See ``AttentionShape``."""
        return None


def attention_shapes(
    traits: Traits, place: Place, block_size: int, fp8: bool = False
) -> list[AttentionShape]:
    """The attention of one rank, as backends need it, with each of the ``head_kinds``; ``fp8``: its
    cache is of 8-bit floats.

    Raises ConfigError if the group does not divide the heads.
    """
    shapes = []
    for heads in traits.head_kinds:
        mine, shared = heads.split(place.group)
        shapes.append(
            AttentionShape(
                num_heads=mine.stop - mine.start,
                num_kv_heads=shared.stop - shared.start,
                head_dim=heads.size,
                scale=traits.attention_scale or heads.size**-0.5,
                block_size=block_size,
                dtype=place.dtype,
                device=place.device,
                causal=traits.causal,
                cap=traits.attention_cap,
                latent=traits.latent,
                fp8=fp8,
            )
        )
    return shapes


class Layer(Protocol):
    """Anything with parameters."""

    def parameters(self) -> Iterable[Parameter]: ...


class NetworkLayer(Layer, Protocol):
    """One of the layers that are counted: it keeps something of the sequences."""

    memory: Memory


class Model(ABC):
    """One pipeline stage of a network on one tensor-parallel rank.

    A subclass builds only the layers of its stage and appends each to ``parts``.
    """

    def __init__(self, place: Place, stage: Stage) -> None:
        self.place = place
        self.stage = stage
        self.parts: list[Layer] = []
        self.layers: Sequence[NetworkLayer] = ()

    @abstractmethod
    def forward(self, batch: Batch, caches: list[Tensor], hidden: Tensor | None = None) -> Tensor:
        """One step of this stage, after the backend's ``begin(batch)``.

        ``caches`` holds what ``memories`` allocate; ``hidden`` [T, H] comes from the stage before,
        None on the first. Returns [T, H] for the next stage or, on the last one, [n, H] of
        ``batch.outputs`` for ``logits``. Where Triton's kernels compute, the host looks at nothing
        on the device, so that a step can be a CUDA graph.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [n, H] of the last stage's output to [n, vocab_size] in the model's type, on the
        group's rank 0; on the others to their share of the vocabulary. Of one that generates."""

    def pooled(self, vectors: Tensor) -> Tensor:
        """What the model makes of pooled rows [m, H] of the last stage's output, all float32: of a
        classifier [m, labels], else the rows themselves."""
        return vectors

    @property
    def memories(self) -> list[Memory]:
        """What each layer of the stage keeps of the sequences."""
        return [layer.memory for layer in self.layers]

    def keep(self, layer: object, batch: Batch) -> Tensor | None:
        """Which tokens go on after the attention of ``layer``: after the network's last one nobody
        reads but ``batch.outputs``."""
        return batch.outputs if layer is self.layers[-1] and self.stage.last else None

    @abstractmethod
    def whole(self) -> "Model":
        """The same network in one piece on the meta device: all names, no memory."""

    def parameters(self) -> list[Parameter]:
        """Every parameter that this rank holds."""
        return [parameter for part in self.parts for parameter in part.parameters()]

    def network(self) -> list[Parameter]:
        """The parameters of the whole network, on whichever rank and stage they live; without
        memory."""
        return self.whole().parameters()

    @abstractmethod
    def canonical(self, name: str) -> str | None:
        """The parameter name of a checkpoint tensor; None for one known to mean nothing."""

    def parameter_name(self, name: str) -> str | None:
        """The same, with what the weights' quantization says of it."""
        canonical = self.canonical(name)
        return None if canonical is None else self.place.quantization.canonical(canonical)

    def pieces(self, name: str) -> list[Piece]:
        """The parameters that a checkpoint tensor holds, if it is not one parameter itself."""
        return []

    def parameter_pieces(self, name: str) -> list[Piece]:
        """The same, also of a tensor of several quantized weights."""
        module, _, leaf = name.rpartition(".")
        pieces = self.pieces(name)
        if pieces or leaf == "weight":
            return pieces
        return self.place.quantization.pieces(leaf, self.pieces(f"{module}.weight"))

    @property
    @abstractmethod
    def tied(self) -> dict[str, str]:
        """Tensors that only repeat another one: alias to owner."""


def kept(y: Tensor, hidden: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Those rows of both that go on; None: all."""
    return (y, hidden) if keep is None else (y[keep], hidden[keep])


def whole_place(place: Place) -> Place:
    """Where ``Model.whole`` lives."""
    return Place(torch.device("meta"), place.dtype, quantization=place.quantization)
