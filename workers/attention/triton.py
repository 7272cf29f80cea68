"""Attention on NVIDIA GPUs by our Triton kernels (workers/kernels/gpu/attention.py)."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ConfigError
from engine.plan import StepPlan, ints
from workers import kernels
from workers.attention.base import Arrays, AttentionShape, Prologue
from workers.batch import Batch
from workers.kernels.fp8_cache import encode

MAX_HEAD_DIM = 512  # of a value
MAX_GROUP = 128  # query heads of one kv head, but of latents any number
SCRATCH_BYTES = 128 << 20  # for spans that wait to be merged
BUSY_PROGRAMS = 1024  # that keep a large GPU busy


class TritonAttention:
    """An AttentionBackend for values of up to 512 elements, in bf16, fp16 and fp32.

    Raises ConfigError for a shape outside these limits.
    """

    def __init__(self, shape: AttentionShape) -> None:
        if not self.supports(shape):
            raise ConfigError(
                f"TritonAttention cannot serve {shape}; needed: an NVIDIA GPU, Triton and a C"
                f" compiler, a causal model, head_dim up to {MAX_HEAD_DIM}, at most {MAX_GROUP}"
                " query heads for each kv head"
            )
        from workers.kernels.gpu import attention, heads

        self.shape = shape
        self._kernels, self._place = attention, heads.place
        latent = shape.latent is not None
        self._parts = attention.parts_of(shape.num_heads, shape.num_kv_heads, latent)
        self._tile = attention.tile_queries(
            shape.num_heads, self._parts, shape.value_dim, shape.dtype
        )
        per_item = shape.num_heads * (shape.value_dim + 2) * 4
        self._room = SCRATCH_BYTES // per_item
        self._scratch = attention.Scratch(
            self._room, shape.num_heads, self._parts, shape.value_dim, shape.device
        )
        self._busy = BUSY_PROGRAMS // self._parts

    @staticmethod
    def supports(shape: AttentionShape) -> bool:
        return (
            kernels.has_triton(shape.device)
            and shape.causal
            and shape.value_dim <= MAX_HEAD_DIM
            and (shape.latent is not None or shape.num_heads <= MAX_GROUP * shape.num_kv_heads)
        )

    @property
    def block_shape(self) -> tuple[int, ...]:
        s = self.shape
        planes, width = 2 if s.latent is None else 1, s.cell_size(s.head_dim)
        return planes, s.num_kv_heads, s.block_size, width

    def allocate(self, num_blocks: int) -> Tensor:
        s = self.shape
        return torch.empty((num_blocks, *self.block_shape), dtype=s.cache_dtype, device=s.device)

    def arrays(self, plan: StepPlan) -> Arrays:
        """counts [4], prefill items [n, 2] and decode items [n, 4]: see ``Rows`` of the
        kernels. Rows of one query whose spans have no room are given to the kernel of the others,
        which finds the same bits."""
        contexts, single = plan.starts + plan.counts, plan.counts == 1
        spans = np.where(single, -(-contexts // self._kernels.SPLIT), 0)
        single &= np.cumsum(spans) <= self._room
        spans = np.where(single, spans, 0)
        row, span = _spread(spans)
        token = np.cumsum(plan.counts) - plan.counts
        decode = np.stack((token[row], plan.slots[row], contexts[row], span), 1)
        tiled, tile = _spread(np.where(single, 0, -(-plan.counts // self._tile)))
        return (
            ints((len(decode), len(tile), 0, 0)),
            # The last ones first: they are late in their prompts and take the longest.
            ints(np.stack((tiled, tile), 1)[::-1]),
            ints(decode),
        )

    def room(self, rows: int, tokens: int, decodes: bool, max_context: int) -> tuple[int, ...]:
        tiles = 0 if decodes else rows + tokens // self._tile
        spans = rows * -(-max_context // self._kernels.SPLIT)
        return 4, 2 * tiles, 4 * min(spans, self._room)

    def begin(self, batch: Batch, arrays: tuple[Tensor, ...]) -> Any:
        counts, prefill, decode = arrays
        return self._kernels.Rows(
            batch.slots, batch.context_lens, batch.query_starts, counts, decode, prefill
        )

    def attend(self, batch: Batch, cache: Tensor, qkv: Tensor, prologue: Prologue) -> Tensor:
        shape, rows = self.shape, batch.attention
        q = self._placed(batch, cache, qkv, prologue)
        out = q.new_empty(len(q), shape.num_heads * shape.value_dim)
        traits = self._kernels.Traits(
            shape.num_heads,
            shape.scale,
            prologue.window,
            shape.cap or 0.0,
            prologue.sinks,
            shape.latent,
        )
        if len(rows.decode):
            programs = min(len(rows.decode), max(2 * len(rows.slots), self._busy))
            self._kernels.decode(
                q, cache, batch.block_tables, rows, traits, self._scratch, out,
                programs * self._parts,
            )  # fmt: skip
        if len(rows.prefill):
            self._kernels.prefill(q, cache, batch.block_tables, rows, traits, out)
        return out

    def _placed(self, batch: Batch, cache: Tensor, qkv: Tensor, prologue: Prologue) -> Tensor:
        """q [T, num_heads * head_dim]; keys and values, if there are any, go to the cache."""
        shape = self.shape
        if shape.latent is None and qkv.shape[1] > shape.num_heads * shape.head_dim:
            return self._place(
                qkv, cache, batch.cells, batch.positions, shape.num_heads, bias=prologue.bias,
                norms=prologue.norms, eps=prologue.eps, rotation=prologue.rotation,
            )  # fmt: skip
        q, k, _ = prologue.split(qkv, batch.positions, shape)
        if k.shape[1]:  # latents, of which there is one for all heads
            write_latents(cache, batch.cells.long(), k[:, 0])
        return q.flatten(1)


def write_latents(cache: Tensor, cells: Tensor, latents: Tensor) -> None:
    """latents [T, D] to ``cells`` [T] of a cache [num_blocks, 1, 1, block_size, D], or D + 1 of
    8-bit floats (see workers/kernels/gpu/attention.py)."""
    size, dim = cache.shape[3], latents.shape[1]
    if cache.shape[4] == dim:
        cache.view(-1, dim).index_copy_(0, cells, latents)
        return
    codes, exponents = cache.view(len(cache), -1).tensor_split([size * dim], 1)
    coded, block, offset = encode(latents), cells // size, cells % size
    codes.view(-1, size, dim)[block, offset] = coded[:, :dim]
    exponents[block, offset] = coded[:, dim]


def _spread(counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(row, number within it) of ``counts[row]`` things of each row, laid end to end."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
