"""The gated delta net (arXiv 2412.06464), linear attention with a state of fixed size: Qwen3-Next.

The state of a sequence is the last inputs of the causal convolution that q, k and v go through, and
a matrix for each head (see ``kernels.delta``). All of it is float32, and tokens are taken one by
one in their order: by the kernels for CPUs and NVIDIA GPUs no bit depends on how a sequence was cut
into steps or on what shares them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from workers import kernels
from workers.batch import Batch
from workers.kernels import delta
from workers.layers.linear import ColumnLinear, Part, RowLinear, part_by_head, scaled
from workers.layers.recurrent import CausalConvolution, make_decay, state_memory
from workers.parallel import Group, Place
from workers.sweep import Sweep
from workers.weights import Parameter


@dataclass(frozen=True)
class DeltaTraits:
    """Heads of keys, each of which serves as many heads of values, and the sizes of both; ``taps``
    tokens go into the convolution. ``by_head``: the checkpoint's projections have all of a key
    head's rows together (Qwen3-Next), not all heads' rows of a kind."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    taps: int
    by_head: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of all q, all k and all v."""
        keys = self.key_heads * self.key_size
        return keys, keys, self.value_heads * self.value_size

    def split(self, group: Group) -> tuple[slice, slice]:
        """This rank's heads of keys and of values. Raises ConfigError, with the allowed sizes, if
        the group does not divide them."""
        keys = group.split(self.key_heads, "linear_num_key_heads")
        return keys, group.split(self.value_heads, "linear_num_value_heads")


class GatedDeltaNet:
    """In attention's place: projections, convolution, and the heads; ``output`` is the last
    projection. The heads are split over the ranks."""

    def __init__(
        self, place: Place, name: str, hidden: int, traits: DeltaTraits, eps: float
    ) -> None:
        self._traits, self._dtype = traits, place.dtype
        keys, values = traits.split(place.group)
        key_cut, value_cut = scaled(keys, traits.key_size), scaled(values, traits.value_size)
        cuts = key_cut, key_cut, value_cut
        self._in = ColumnLinear(place, self._parts(name, keys, values, cuts), hidden, bias=False)
        width = traits.value_heads * traits.value_size
        self.output = RowLinear(place, f"{name}.out_proj", width, hidden, bias=False)

        mine = values.stop - values.start
        self._heads = delta.Heads(
            keys.stop - keys.start, mine, traits.key_size, traits.value_size,
            decay=place.floats(mine), dt=place.floats(mine), norm=place.floats(traits.value_size),
            eps=eps,
        )  # fmt: skip
        heads = (traits.value_heads,)
        self._parameters = [
            Parameter(f"{name}.norm.weight", (traits.value_size,), self._heads.norm),
            Parameter(f"{name}.dt_bias", heads, self._heads.dt, (values,)),
            Parameter(f"{name}.A_log", heads, self._heads.decay, (values,), make_decay),
        ]
        names = [f"{name}.conv1d_{part}" for part in "qkv"]
        self._convolution = CausalConvolution(place, names, traits.widths, cuts, traits.taps)
        size = self._convolution.past_size + mine * traits.key_size * traits.value_size
        self.memory = state_memory(size, place.device)

    def _parts(
        self, name: str, keys: slice, values: slice, cuts: tuple[slice, slice, slice]
    ) -> list[Part]:
        """The projections, whose outputs are q, k, v, z, b and a side by side."""
        traits = self._traits
        if not traits.by_head:
            sizes = *traits.widths, traits.widths[2], traits.value_heads, traits.value_heads
            parts = zip("qkvzba", sizes, (*cuts, cuts[2], values, values), strict=True)
            return [Part(f"{name}.in_proj_{part}", size, cut) for part, size, cut in parts]
        shared = traits.value_heads // traits.key_heads
        value = shared * traits.value_size
        return [
            part_by_head(f"{name}.in_proj_{which}", widths, traits.key_heads, keys)
            for which, widths in (
                ("qkvz", [traits.key_size, traits.key_size, value, value]),
                ("ba", [shared, shared]),
            )
        ]

    def parameters(self) -> Iterable[Parameter]:
        convolution = self._convolution.parameters()
        return chain(self._in.parameters(), self._parameters, convolution, self.output.parameters())

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """x [T, hidden] to the heads' [T, value heads * value size], for ``output``; the rows'
        states in ``cache`` go on."""
        y = self._in(x)
        channels, past = self._convolution.channels, self._convolution.past_size
        qkv, rest = y[:, :channels], y[:, channels:]
        lines, state = cache[:, :past], cache[:, past:]
        if kernels.has_triton(y.device):
            return self._on_gpu(qkv, rest, lines, state, batch.sweep)
        qkv = self._convolution(qkv.float(), lines, batch.sweep)
        return delta.recur(qkv, rest.float(), state, self._heads, batch.sweep).to(self._dtype)

    def _on_gpu(
        self, qkv: Tensor, rest: Tensor, lines: Tensor, state: Tensor, sweep: Sweep
    ) -> Tensor:
        """The same by Triton's kernels."""
        from workers.kernels import gpu

        heads, starts, states = self._heads, sweep.starts, sweep.states
        z, gates = rest.split_with_sizes([heads.values * heads.value_size, 2 * heads.values], 1)
        qkv = self._convolution.with_silu_on_gpu(qkv, lines, sweep)
        found = gpu.delta.recur(qkv, gates, state, heads, starts, states)
        return gpu.norm.gated_rms_norm(found, z, heads.norm, heads.eps)
