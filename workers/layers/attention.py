"""Self-attention around a backend: projections, head norms and rotation, split by heads."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from engine.errors import ConfigError
from workers import kernels
from workers.attention.base import LayerAttention, Prologue, block_bytes
from workers.batch import Batch
from workers.layers.linear import ColumnLinear, Part, RowLinear, part_by_head, scaled
from workers.layers.memory import Memory, nothing
from workers.layers.norm import RMSNorm, WideNorm
from workers.layers.rotary import Rotary, halves
from workers.parallel import Group, Place
from workers.weights import Parameter


@dataclass(frozen=True)
class Heads:
    """A model's attention heads. ``size`` is the dimension of one."""

    count: int
    kv_count: int
    size: int

    def split(self, group: Group) -> tuple[slice, slice]:
        """This rank's heads and its key-value heads; the latter are replicated when too few.

        Raises ConfigError, with the allowed sizes, if the group does not divide them.
        """
        mine = group.split(self.count, "the number of attention heads")
        if group.size <= self.kv_count:
            return mine, group.split(self.kv_count, "the number of key-value heads")
        if group.size % self.kv_count:
            raise ConfigError(
                f"tensor_parallel_size={group.size} must be a divisor or a multiple of the number "
                f"of key-value heads ({self.kv_count})"
            )
        shared = group.rank * self.kv_count // group.size
        return mine, slice(shared, shared + 1)


@dataclass(frozen=True)
class QKNorm:
    """RMS norms of q and k: of each head (Qwen3) or ``wide``, of all heads together (Olmo 2)."""

    eps: float
    wide: bool = False
    offset: float = 0.0


class Attention:
    """Projections q, k and v as one product, the backend, and the output projection.

    ``rotary`` rotates q and k, behind their ``norm``; ``window`` is the sliding window in tokens.
    ``query_scales`` [max_length] multiply q by its position (Llama 4). With ``sinks`` each head has
    a learned logit that takes a share of its attention and gives nothing (gpt-oss). With
    ``value_norm``, its eps, values have an RMS norm without weight; where they are ``from_keys``,
    they are what the keys are before theirs (Gemma 4). One that ``shares`` has queries alone, for
    the keys and values in another layer's cache. ``gated``: q's projection has a gate beside each
    head, whose sigmoid multiplies its result (Qwen3-Next).
    """

    def __init__(
        self,
        place: Place,
        name: str,
        hidden: int,
        heads: Heads,
        backend: LayerAttention,
        *,
        output: str = "o_proj",
        qkv_bias: bool = False,
        output_bias: bool = False,
        norm: QKNorm | None = None,
        window: int | None = None,
        rotary: Rotary | None = None,
        query_scales: Tensor | None = None,
        value_norm: float | None = None,
        from_keys: bool = False,
        shares: bool = False,
        sinks: bool = False,
        gated: bool = False,
    ) -> None:
        mine, shared = heads.split(place.group)
        self._backend = backend
        if shares:
            self.memory = nothing(place.device)
        else:
            self.memory = Memory(backend.allocate, block_bytes(backend))

        def part(which: str, count: int, cut: slice) -> Part:
            order = None
            if which != "v" and rotary is not None and rotary.rope.interleaved:
                order = halves(rotary.rope, heads.size, cut.stop - cut.start)
            width = scaled(cut, heads.size)
            return Part(f"{name}.{which}_proj", count * heads.size, width, order)

        own = "" if shares else "k" if from_keys else "kv"
        parts = [part("q", heads.count, mine)]
        parts += [part(which, heads.kv_count, shared) for which in own]
        self._width = parts[0].share
        self._from_keys = from_keys
        self._value_norm: _ValueNorm | None = None
        if value_norm is not None and not shares:
            self._value_norm = _ValueNorm(place, heads.size, value_norm)
        self._gated = gated
        if gated:
            parts[0] = part_by_head(f"{name}.q_proj", [heads.size] * 2, heads.count, mine)
        self._query_scales = query_scales
        wide = norm is not None and norm.wide
        # Else before what is done here.
        late_bias = not wide and query_scales is None and not gated and value_norm is None
        self._qkv = ColumnLinear(place, parts, hidden, qkv_bias, late_bias=late_bias)
        self.output = RowLinear(
            place, f"{name}.{output}", heads.count * heads.size, hidden, output_bias
        )
        self._make_norms(place, name, heads.size, parts, norm)
        self._sinks: list[Parameter] = []
        values = None
        if sinks:
            values = place.floats(mine.stop - mine.start)
            self._sinks = [Parameter(f"{name}.sinks", (heads.count,), values, (mine,))]
        weights = [norm.weight for norm in self._head_norms]
        self._prologue = Prologue(
            bias=self._qkv.late_bias,
            norms=(weights[0], weights[-1]) if weights else None,
            eps=norm.eps if norm else 0.0,
            rotation=None if rotary is None else (rotary.cos, rotary.sin),
            window=window,
            sinks=values,
        )

    def _make_norms(
        self, place: Place, name: str, size: int, parts: list[Part], norm: QKNorm | None
    ) -> None:
        """Of q and, if there are any, keys: the first two of ``parts``."""
        names = f"{name}.q_norm", f"{name}.k_norm"
        self._wide_norm: WideNorm | None = None
        self._head_norms: list[RMSNorm] = []
        if norm is not None and norm.wide:
            sizes, cuts = (parts[0].size, parts[1].size), (parts[0].cut, parts[1].cut)
            self._wide_norm = WideNorm(place, names, sizes, cuts, norm.eps)
        elif norm is not None:
            self._head_norms = [
                RMSNorm(place, which, size, norm.eps, norm.offset) for which in names[: len(parts)]
            ]

    def parameters(self) -> Iterable[Parameter]:
        norms = chain.from_iterable(norm.parameters() for norm in self._head_norms)
        wide = self._wide_norm.parameters() if self._wide_norm is not None else ()
        return chain(self._qkv.parameters(), norms, wide, self._sinks, self.output.parameters())

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """x [T, hidden] to the heads' [T, heads * size], for ``output``; keys and values go to
        ``cache``."""
        qkv = self._qkv(x)
        if self._gated:
            q, gate, kv = qkv.tensor_split([self._width, 2 * self._width], 1)
            heads = self._backend.attend(batch, cache, torch.cat((q, kv), 1), self._prologue)
            return heads * kernels.sigmoid(gate)
        if self._wide_norm is not None:
            self._wide_norm(qkv)
        if self._query_scales is not None:
            qkv[:, : self._width] *= self._query_scales[batch.positions][:, None]
        if self._value_norm is not None:
            if self._from_keys:
                qkv = torch.cat((qkv, qkv[:, self._width :]), 1)
            self._value_norm(qkv[:, (self._width + qkv.shape[1]) // 2 :])
        return self._backend.attend(batch, cache, qkv, self._prologue)


class _ValueNorm:
    """An RMS norm of each head, in place, without weight."""

    def __init__(self, place: Place, size: int, eps: float) -> None:
        self._ones = torch.ones(size, dtype=place.dtype, device=place.device)
        self._eps = eps

    def __call__(self, values: Tensor) -> None:
        """values [T, kv heads * size]"""
        by_head = values.view(len(values), -1, len(self._ones))
        by_head.copy_(kernels.rms_norm(by_head, self._ones, self._eps))
