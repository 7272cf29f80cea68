"""Attention in plain PyTorch: gathers each row's keys and values, then masks and multiplies."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.plan import StepPlan
from workers.attention.base import Arrays, AttentionShape, Prologue
from workers.batch import Batch
from workers.kernels.fp8_cache import decode, encode

MAX_GATHERED = 1 << 26  # elements of keys gathered at once


class Group(NamedTuple):
    """Rows that are attended together: indices of the rows, their tokens, the longest context."""

    rows: Tensor
    tokens: Tensor | slice
    context: int


class GatherAttention:
    """An AttentionBackend for any device, dtype and shape. A block is [2, block_size, kv_heads, D],
    of latents [1, ...]; of 8-bit floats each vector has its scale behind it.

    Rows of one query are taken together, padded to the longest context; others one by one.
    """

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    @staticmethod
    def supports(shape: AttentionShape) -> bool:
        return True

    @property
    def block_shape(self) -> tuple[int, ...]:
        s = self.shape
        planes, width = 2 if s.latent is None else 1, s.cell_size(s.head_dim)
        return planes, s.block_size, s.num_kv_heads, width

    def allocate(self, num_blocks: int) -> Tensor:
        s = self.shape
        return torch.empty((num_blocks, *self.block_shape), dtype=s.cache_dtype, device=s.device)

    def arrays(self, plan: StepPlan) -> Arrays:
        return ()

    def room(self, rows: int, tokens: int, decodes: bool, max_context: int) -> tuple[int, ...]:
        return ()

    def begin(self, batch: Batch, arrays: tuple[Tensor, ...] = ()) -> list[Group]:
        """Groups of rows that are attended together."""
        starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
        lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        per_token = self.shape.num_kv_heads * self.shape.head_dim
        groups: list[list[int]] = []
        room = 0
        single = [r for r, n in enumerate(lengths) if n == 1]
        for row in sorted(single, key=lambda r: -contexts[r]):
            if room < 1:  # the first row of a group is its longest
                groups.append([])
                room = max(1, MAX_GATHERED // (contexts[row] * per_token))
            groups[-1].append(row)
            room -= 1
        groups += [[r] for r, n in enumerate(lengths) if n > 1]
        device = batch.cells.device
        return [
            Group(
                torch.tensor(rows, device=device),
                slice(starts[rows[0]], starts[rows[0] + 1])
                if len(rows) == 1
                else torch.tensor([starts[r] for r in rows], device=device),
                max(contexts[r] for r in rows),
            )
            for rows in groups
        ]

    def attend(self, batch: Batch, cache: Tensor, qkv: Tensor, prologue: Prologue) -> Tensor:
        s = self.shape
        q, k, v = prologue.split(qkv, batch.positions, s)
        block, offset = batch.cells // s.block_size, batch.cells % s.block_size
        if k.shape[1]:
            cache[block, 0, offset] = encode(k) if s.fp8 else k
            if s.latent is None:
                cache[block, 1, offset] = encode(v) if s.fp8 else v
        out = q.new_empty(len(q), s.num_heads, s.value_dim)
        for group in batch.attention:
            part = self._rows(batch, cache, q[group.tokens], group, prologue)
            out[group.tokens] = part.to(out.dtype)
        return out.flatten(1)

    def _rows(
        self, batch: Batch, cache: Tensor, q: Tensor, group: Group, prologue: Prologue
    ) -> Tensor:
        """Attention of q [rows * queries, heads, D], each row with as many queries."""
        s, rows, context = self.shape, group.rows, group.context
        queries = q.shape[0] // rows.shape[0]
        lens = batch.context_lens[rows].long()[:, None, None]
        blocks = -(-context // s.block_size)
        tables = batch.block_tables[batch.slots[rows], :blocks].long()
        position = lens - queries + torch.arange(queries, device=q.device)[:, None]
        key = torch.arange(blocks * s.block_size, device=q.device)
        last = position if s.causal else lens - 1
        seen = (key <= last).expand(-1, queries, -1)  # [rows, queries, keys]
        if prologue.window is not None:
            seen = seen & (key > position - prologue.window)
        # Cells that no query sees may hold anything, blocks that none sees may be gone.
        used = seen.any(1)
        alive = used.view(len(rows), blocks, -1).any(-1)
        pages = cache[tables.where(alive, 0)]  # [rows, blocks, 2 or 1, block_size, kv_heads, D]
        if s.fp8:
            pages = decode(pages, s.dtype)
        keys, values = (
            page.flatten(1, 2).where(used[..., None, None], 0).transpose(1, 2)
            for page in (pages[:, :, 0], pages[:, :, -1, ..., -s.value_dim :])
        )
        q = q.view(len(rows), queries, s.num_heads, s.head_dim).transpose(1, 2)
        if s.cap is not None or prologue.sinks is not None:
            attended = _attended(q, keys, values, seen[:, None], s, prologue.sinks)
        else:
            attended = F.scaled_dot_product_attention(
                q,
                keys,
                values,
                attn_mask=seen[:, None],
                scale=s.scale,
                enable_gqa=s.num_heads != s.num_kv_heads,
            )
        return attended.transpose(1, 2).reshape(-1, s.num_heads, s.value_dim)


def _attended(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    shape: AttentionShape,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(cap · tanh(q · k · scale / cap)) · v of q [rows, heads, queries, D], keys and values
    [rows, kv_heads, keys, D]; ``seen`` is the mask [rows, 1, queries, keys]. ``sinks`` [heads] are
    among the logits of the softmax."""
    shared = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))
    scores = q @ keys.transpose(2, 3) * shape.scale
    if shape.cap is not None:
        scores = shape.cap * torch.tanh(scores / shape.cap)
    scores = scores.masked_fill(~seen, -torch.inf).float()
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return weights.to(q.dtype) @ values
