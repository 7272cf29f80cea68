"""The interface of attention backends: a step's metadata in, attention out."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.plan import Ints, StepPlan
from workers import kernels
from workers.batch import Batch

Arrays = tuple[Ints, ...]


@dataclass(frozen=True)
class AttentionShape:
    """What a backend must know of one rank's attention; the same for every layer of a model.

    Not ``causal``: queries see all of their row's keys, and the row is a whole prompt. ``cap`` is a
    soft cap of scaled products (Gemma 2): cap · tanh(x / cap).
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

    @property
    def block_elements(self) -> int:
        """Elements of one layer's keys and values in one block."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        return self.block_elements * self.dtype.itemsize


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
        """q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim] of qkv [T, ...]."""
        if self.bias is not None:
            qkv = qkv + self.bias
        counts = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = torch.split_with_sizes(
            qkv.view(len(qkv), sum(counts), shape.head_dim), counts, dim=1
        )
        if self.norms is not None:
            q, k = (
                kernels.rms_norm(x, weight, self.eps)
                for x, weight in zip((q, k), self.norms, strict=True)
            )
        if self.rotation is not None:
            kernels.rope(q, k, positions, *self.rotation)
        return q, k, v


class AttentionBackend(Protocol):
    """Paged attention. The layout inside a block is the backend's own business;

    a layer's cache is one tensor whose first dimension is the block, so that whole blocks can be
    copied without knowing more. A backend keeps nothing of a step.
    """

    shape: AttentionShape

    def __init__(self, shape: AttentionShape) -> None: ...

    def allocate(self, num_blocks: int) -> Tensor:
        """One layer's cache: a tensor [num_blocks, ...] of ``block_elements`` each."""
        ...

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

    def attend(self, batch: Batch, cache: Tensor, qkv: Tensor, prologue: Prologue) -> Tensor:
        """Write a layer's keys and values into ``cache``, then attend.

        qkv is [T, (num_heads + 2 num_kv_heads) * head_dim]; it may be written to.
        Returns [T, num_heads * head_dim].
        """
        ...
