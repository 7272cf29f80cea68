"""Mamba-2 (arXiv 2405.21060), a state space model with a state of fixed size, as Nemotron-H has it.

The state of a sequence is the last inputs of the causal convolution that x, B and C go through, and
a matrix for each head (see ``kernels.mamba2``). All of it is float32, and tokens are taken one by
one in their order: by the kernels for CPUs and NVIDIA GPUs no bit depends on how a sequence was cut
into steps or on what shares them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from workers import kernels
from workers.batch import Batch
from workers.kernels import mamba2
from workers.layers.linear import ColumnLinear, Part, RowLinear, scaled
from workers.layers.recurrent import CausalConvolution, make_decay, state_memory
from workers.parallel import Group, Place
from workers.sweep import Sweep
from workers.weights import Parameter


@dataclass(frozen=True)
class Mamba2Traits:
    """``heads`` of ``size`` each, in ``groups`` that share B and C of ``state_size`` and a norm;
    ``taps`` tokens go into the convolution, which may have a bias."""

    heads: int
    size: int
    groups: int
    state_size: int
    taps: int
    conv_bias: bool

    @property
    def inner(self) -> int:
        """The width of x and of the gate z."""
        return self.heads * self.size

    @property
    def shared(self) -> int:
        """The width of B and of C."""
        return self.groups * self.state_size

    @property
    def projected(self) -> dict[str, int]:
        """What the checkpoint's one projection makes, in its order, and the width of each."""
        return {"z": self.inner, **self.convolved, "dt": self.heads}

    @property
    def convolved(self) -> dict[str, int]:
        """What goes through the convolution."""
        return {"x": self.inner, "B": self.shared, "C": self.shared}

    def split(self, group: Group) -> tuple[slice, slice]:
        """This rank's groups and its heads. Raises ConfigError, with the allowed sizes, if the
        ranks do not divide them."""
        groups = group.split(self.groups, "n_groups")
        each = self.heads // self.groups
        return groups, slice(groups.start * each, groups.stop * each)


class Mamba2:
    """In attention's place: projection, convolution, and the heads; ``output`` is the last
    projection. The heads are split over the ranks by their groups."""

    def __init__(
        self, place: Place, name: str, hidden: int, traits: Mamba2Traits, eps: float
    ) -> None:
        self._dtype = place.dtype
        groups, heads = traits.split(place.group)
        inner, shared = scaled(heads, traits.size), scaled(groups, traits.state_size)
        cuts = {"x": inner, "B": shared, "C": shared, "z": inner, "dt": heads}
        sizes = traits.projected
        parts = [Part(f"{name}.in_proj_{part}", sizes[part], cut) for part, cut in cuts.items()]
        self._in = ColumnLinear(place, parts, hidden, bias=False)
        self.output = RowLinear(place, f"{name}.out_proj", traits.inner, hidden, bias=False)
        convolved = traits.convolved
        self._convolution = CausalConvolution(
            place,
            [f"{name}.conv1d_{part}" for part in convolved],
            list(convolved.values()),
            [cuts[part] for part in convolved],
            traits.taps,
            traits.conv_bias,
        )

        count, width = heads.stop - heads.start, inner.stop - inner.start
        self._heads = mamba2.Heads(
            groups.stop - groups.start, count, traits.size, traits.state_size,
            decay=place.floats(count), dt=place.floats(count), skip=place.floats(count),
            norm=place.floats(width), eps=eps,
        )  # fmt: skip
        all_heads, mine = (traits.heads,), (heads,)
        self._parameters = [
            Parameter(f"{name}.A_log", all_heads, self._heads.decay, mine, make_decay),
            Parameter(f"{name}.dt_bias", all_heads, self._heads.dt, mine),
            Parameter(f"{name}.D", all_heads, self._heads.skip, mine),
            Parameter(f"{name}.norm.weight", (traits.inner,), self._heads.norm, (inner,)),
        ]
        size = self._convolution.past_size + width * traits.state_size
        self.memory = state_memory(size, place.device)

    def parameters(self) -> Iterable[Parameter]:
        convolution = self._convolution.parameters()
        return chain(self._in.parameters(), self._parameters, convolution, self.output.parameters())

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """x [T, hidden] to the heads' [T, heads * size], for ``output``; the rows' states in
        ``cache`` go on."""
        y = self._in(x)
        channels, past = self._convolution.channels, self._convolution.past_size
        xbc, rest = y[:, :channels], y[:, channels:]
        lines, state = cache[:, :past], cache[:, past:]
        if kernels.has_triton(y.device):
            return self._on_gpu(xbc, rest, lines, state, batch.sweep)
        xbc = self._convolution(xbc.float(), lines, batch.sweep)
        return mamba2.recur(xbc, rest.float(), state, self._heads, batch.sweep).to(self._dtype)

    def _on_gpu(
        self, xbc: Tensor, rest: Tensor, lines: Tensor, state: Tensor, sweep: Sweep
    ) -> Tensor:
        """The same by Triton's kernels."""
        from workers.kernels import gpu

        heads = self._heads
        z, times = rest.split_with_sizes([heads.count * heads.size, heads.count], 1)
        xbc = self._convolution.with_silu_on_gpu(xbc, lines, sweep)
        y = gpu.mamba2.recur(xbc, times, state, heads, sweep.starts, sweep.states)
        return gpu.norm.rms_norm_of_gated(y, z, heads.norm, heads.groups, heads.eps)
