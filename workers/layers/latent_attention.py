"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434), always in its absorbed form."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from workers.attention.base import LayerAttention, Prologue, block_bytes
from workers.batch import Batch
from workers.layers.linear import ColumnLinear, Packed, Part, RowLinear
from workers.layers.memory import Memory
from workers.layers.norm import RMSNorm
from workers.layers.rotary import Rope, Rotary, halves
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.weights import Parameter

EPS = 1e-6  # of the latents' norms, whatever the config says of the others


@dataclass(frozen=True)
class LatentTraits:
    """Sizes: ``rank`` of a token's latent, ``query_rank`` of that of its queries (None: they have
    none), and of a head ``nope`` dimensions without positions and ``value`` of its value."""

    rank: int
    query_rank: int | None
    nope: int
    value: int


class LatentAttention:
    """Attention whose keys and values are linear in one latent for each token.

    A head's key is Wk · latent beside a rotated part that all heads share, its value Wv · latent.
    So q · key is (Wkᵀ q) · latent, and the sum of values is Wv times that of latents: ``backend``
    attends over [rotated part, latent] alone, one for all heads. This form serves prompts too, so
    that a token's result does not depend on what was computed in one piece with it.
    """

    def __init__(
        self,
        place: Place,
        name: str,
        hidden: int,
        heads: int,
        traits: LatentTraits,
        backend: LayerAttention,
        *,
        bias: bool,
        rotary: Rotary,
    ) -> None:
        self._backend = backend
        self.memory = Memory(backend.allocate, block_bytes(backend))
        self._traits = traits
        rope = self._rope = rotary.rope.head_dim
        mine = place.group.split(heads, "the number of attention heads")
        self._heads: int = mine.stop - mine.start
        rank, size = traits.rank, rope + traits.nope
        parts = [
            _whole(f"{name}.kv_a_proj_with_mqa", rank + rope, _rotated_first(rotary.rope, rank))
        ]
        queries, inputs = f"{name}.q_proj", hidden
        self._query_norm: RMSNorm | None = None
        if traits.query_rank is not None:
            queries, inputs = f"{name}.q_b_proj", traits.query_rank
            parts.insert(0, _whole(f"{name}.q_a_proj", inputs))
            self._query_norm = RMSNorm(place, f"{name}.q_a_layernorm", inputs, EPS)
        self._down = ColumnLinear(place, parts, hidden, bias)
        one = _rotated_first(rotary.rope, traits.nope)
        order = (torch.arange(self._heads)[:, None] * size + one).flatten()
        rows = slice(mine.start * size, mine.stop * size)
        self._queries = ColumnLinear(
            place, [Part(queries, heads * size, rows, order)], inputs, bias=False
        )
        self._latent_norm = RMSNorm(place, f"{name}.kv_a_layernorm", rank, EPS)
        self._make_heads(place, f"{name}.kv_b_proj", heads, mine)
        self.output = RowLinear(place, f"{name}.o_proj", heads * traits.value, hidden, bias)
        self._prologue = Prologue(rotation=(rotary.cos, rotary.sin))

    def _make_heads(self, place: Place, name: str, heads: int, mine: slice) -> None:
        """Wk and Wv of this rank's heads, from one tensor of both."""
        rank, each = self._traits.rank, self._traits.nope + self._traits.value
        weight = torch.empty(self._heads * each, rank, dtype=place.dtype, device=place.device)
        rows = slice(mine.start * each, mine.stop * each)

        def fill(weight: Tensor) -> None:
            both = weight.view(self._heads, each, rank)
            keys, values = both.split_with_sizes([self._traits.nope, self._traits.value], 1)
            self._absorb, self._expand = HeadLinear(keys.transpose(1, 2)), HeadLinear(values)

        self._of_heads = place.stored(
            Parameter(f"{name}.weight", (heads * each, rank), weight, (rows, slice(None)), fill)
        )

    def parameters(self) -> Iterable[Parameter]:
        parts = (self._down, self._query_norm, self._queries, self._latent_norm, self.output)
        found = (part.parameters() for part in parts if part is not None)
        return chain(self._of_heads, *found)

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """x [T, hidden] to the heads' [T, heads * value], for ``output``; the latents go to
        ``cache``."""
        heads, rope, rank = self._heads, self._rope, self._traits.rank
        down = self._down(x)
        if self._query_norm is not None:
            x = self._query_norm(Stream(down[:, : -rope - rank]))
        queries = self._queries(x).view(len(x), heads, -1)
        qk = x.new_empty(len(x), heads + 1, rope + rank)
        qk[:, :heads, :rope] = queries[..., :rope]
        qk[:, :heads, rope:] = self._absorb(queries[..., rope:])
        qk[:, heads, :rope] = down[:, -rope - rank : -rank]
        qk[:, heads, rope:] = self._latent_norm(Stream(down[:, -rank:]))
        latents = self._backend.attend(batch, cache, qk.flatten(1), self._prologue)
        return self._expand(latents.view(len(x), heads, rank)).flatten(1)


class HeadLinear:
    """A product for each head: x [T, heads, K] by weights [heads, N, K] to [T, heads, N].

    On a CPU no bit of a row depends on the others; on a GPU cuBLAS may sum in another order.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights: Tensor | None = weights
        self._products: list[Packed] = []
        if weights.device.type == "cpu":
            self._weights = None
            for weight in map(Tensor.contiguous, weights.unbind()):
                self._products.append(Packed(weight, None))
                self._products[-1].ready(weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self._weights is not None:
            return torch.bmm(x.transpose(0, 1), self._weights.transpose(1, 2)).transpose(0, 1)
        by_head = x.transpose(0, 1).contiguous()
        pairs = zip(self._products, by_head, strict=True)
        return torch.stack([product(head) for product, head in pairs], 1)


def _whole(name: str, size: int, order: Tensor | None = None) -> Part:
    """A linear that every rank computes whole."""
    return Part(name, size, slice(0, size), order)


def _rotated_first(rope: Rope, others: int) -> Tensor:
    """The order of ``others`` dimensions with the rotated ones behind them, in which those come
    first, as halves."""
    rotated = torch.arange(rope.head_dim)
    if rope.interleaved:
        rotated = halves(rope, rope.head_dim, 1)
    return torch.cat((rotated + others, torch.arange(others)))
