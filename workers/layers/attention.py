"""Self-attention around a backend: projections, head norms and rotation, split by heads."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from engine.errors import ConfigError
from workers.attention.base import AttentionBackend, Prologue
from workers.batch import Batch
from workers.layers.linear import ColumnLinear, Part, RowLinear
from workers.layers.norm import RMSNorm
from workers.layers.rotary import Rotary
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


class Attention:
    """Projections q, k and v as one product, the backend, and the output projection.

    ``rotary`` rotates q and k; ``head_norm`` is the eps of their RMS norms (Qwen3), None for no
    norm; ``window`` is the sliding window in tokens.
    """

    def __init__(
        self,
        place: Place,
        name: str,
        hidden: int,
        heads: Heads,
        backend: AttentionBackend,
        *,
        output: str = "o_proj",
        qkv_bias: bool = False,
        output_bias: bool = False,
        head_norm: float | None = None,
        window: int | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        mine, shared = heads.split(place.group)
        self._backend = backend

        def part(which: str, count: int, cut: slice) -> Part:
            width = slice(cut.start * heads.size, cut.stop * heads.size)
            return Part(f"{name}.{which}_proj", count * heads.size, width)

        parts = [part("q", heads.count, mine)] + [
            part(which, heads.kv_count, shared) for which in ("k", "v")
        ]
        self._qkv = ColumnLinear(place, parts, hidden, qkv_bias, late_bias=True)
        self.output = RowLinear(
            place, f"{name}.{output}", heads.count * heads.size, hidden, output_bias
        )
        self._norms = [
            RMSNorm(place, f"{name}.{which}_norm", heads.size, head_norm)
            for which in ("q", "k")
            if head_norm is not None
        ]

        self._prologue = Prologue(
            bias=self._qkv.late_bias,
            norms=(self._norms[0].weight, self._norms[1].weight) if self._norms else None,
            eps=head_norm or 0.0,
            rotation=None if rotary is None else (rotary.cos, rotary.sin),
            window=window,
        )

    def parameters(self) -> Iterable[Parameter]:
        norms = (norm.parameters() for norm in self._norms)
        return chain(self._qkv.parameters(), *norms, self.output.parameters())

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """x [T, hidden] to the heads' [T, heads * size], for ``output``; keys and values go to
        ``cache``."""
        return self._backend.attend(batch, cache, self._qkv(x), self._prologue)
