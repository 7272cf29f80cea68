"""The interface of attention backends: a step's metadata in, attention out."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.batch import Batch


@dataclass(frozen=True)
class AttentionShape:
    """What a backend must know of one rank's attention; the same for every layer of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def block_elements(self) -> int:
        """Elements of one layer's keys and values in one block."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim


class AttentionBackend(Protocol):
    """Paged causal attention. The layout inside a block is the backend's own business;

    a layer's cache is one tensor whose first dimension is the block, so that whole blocks can be
    copied without knowing more.
    """

    shape: AttentionShape

    def __init__(self, shape: AttentionShape) -> None: ...

    def allocate(self, num_blocks: int) -> Tensor:
        """One layer's cache: a tensor [num_blocks, ...] of ``block_elements`` each."""
        ...

    def begin(self, batch: Batch) -> None:
        """Once a step, before any layer."""
        ...

    def attend(
        self, cache: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None = None
    ) -> Tensor:
        """Write k and v into ``cache``, then attend.

        q is [T, num_heads, head_dim]; k and v are [T, num_kv_heads, head_dim] (any strides on the
        token dimension). ``window`` w lets a query at position p see positions p - w + 1 to p.
        Returns [T, num_heads * head_dim].
        """
        ...
