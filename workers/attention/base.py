"""The interface of attention backends: a step's metadata in, attention out."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.plan import Ints, StepPlan
from workers import kernels
from workers.batch import Batch
from workers.kernels.fp8_cache import SCALE_BYTES

Arrays = tuple[Ints, ...]


@dataclass(frozen=True)
class AttentionShape:
    """What a backend must know of one rank's attention; the same for every layer of a model.

    Not ``causal``: queries see all of their row's keys, and the row is a whole prompt. ``cap`` is a
    soft cap of scaled products (Gemma 2): cap · tanh(x / cap). ``latent``: a key's last so many
    elements are its value (DeepSeek V2). ``fp8``: the cache holds keys and values as 8-bit floats
    (workers/kernels/fp8_cache.py), else in ``dtype``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    dtype: torch.dtype
    device: torch.device
    causal: bool = True
    cap: float | None = None
    latent: int | None = None
    fp8: bool = False

    @property
    def value_dim(self) -> int:
        return self.latent or self.head_dim

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of what blocks are made of."""
        return torch.uint8 if self.fp8 else self.dtype

    def cell_size(self, dim: int) -> int:
        """Elements of ``cache_dtype`` that a vector of ``dim`` takes in a block."""
        return dim + SCALE_BYTES if self.fp8 else dim


@dataclass(frozen=True)
class Prologue:
    """What becomes of a layer's fused projection before attention: ``bias`` (where the product
    has not added it), RMS norms of q and k of ``eps``, rotation by tables of cos and sin. And how
    the layer attends: ``window`` w lets a query at position p see positions p - w + 1 to p;
    ``sinks`` [num_heads], float32, are logits that take a share of each query's attention and give
    nothing (gpt-oss)."""

    bias: Tensor | None = None
    norms: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0
    rotation: tuple[Tensor, Tensor] | None = None
    window: int | None = None
    sinks: Tensor | None = None

    def split(
        self, qkv: Tensor, positions: Tensor, shape: AttentionShape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, num_heads, head_dim], k [T, num_kv_heads, head_dim] and v [T, num_kv_heads,
        value_dim] of qkv [T, ...]."""
        if self.bias is not None:
            qkv = qkv + self.bias
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        parts = qkv.view(len(qkv), -1, shape.head_dim)
        q, k, v = parts.tensor_split((heads, heads + kv_heads), dim=1)
        if shape.latent is not None:
            v = k[..., -shape.latent :]
        if self.norms is not None:
            q, k = (
                kernels.rms_norm(x, weight, self.eps) if x.shape[1] else x
                for x, weight in zip((q, k), self.norms, strict=True)
            )
        if self.rotation is not None:
            kernels.rope(q, k, positions, *self.rotation)
        return q, k, v


class LayerAttention(Protocol):
    """Paged attention as a layer sees it. The layout inside a block is the backend's own business;

    a layer's cache is one tensor whose first dimension is the block, so that whole blocks can be
    copied without knowing more.
    """

    shape: AttentionShape

    @property
    def block_shape(self) -> tuple[int, ...]:
        """What one layer keeps in one block."""
        ...

    def allocate(self, num_blocks: int) -> Tensor:
        """One layer's cache: a tensor [num_blocks, *block_shape]."""
        ...

    def attend(self, batch: Batch, cache: Tensor, qkv: Tensor, prologue: Prologue) -> Tensor:
        """Write a layer's keys and values into ``cache``, then attend.

        qkv is [T, (num_heads + 2 num_kv_heads) * head_dim], of latents without the last
        num_kv_heads; it may be written to. Where it has queries alone, another layer has written
        the step's keys and values. ``prologue.window`` w lets a query at position p see positions
        p - w + 1 to p. Returns [T, num_heads * value_dim].
        """
        ...


class AttentionBackend(LayerAttention, Protocol):
    """Paged attention. A backend keeps nothing of a step."""

    def __init__(self, shape: AttentionShape) -> None: ...

    def arrays(self, plan: StepPlan) -> Arrays:
        """What it wants to have on the device of a plan; only the last one may be large."""
        ...

    def room(self, rows: int, tokens: int, decodes: bool, max_context: int) -> tuple[int, ...]:
        """The most elements of each of ``arrays``, of any plan of so many rows and tokens.
        ``decodes``: all rows have one token."""
        ...

    def begin(self, batch: Batch, arrays: tuple[Tensor, ...]) -> Any:
        """Once a step, before any layer: what ``attend`` finds as ``batch.attention``. ``arrays``
        are those of the plan, on the device, with room behind each."""
        ...


def block_bytes(backend: LayerAttention) -> int:
    """Bytes of what one layer keeps in one block."""
    return math.prod(backend.block_shape) * backend.shape.cache_dtype.itemsize
