"""The gated delta net (arXiv 2412.06464), linear attention with a state of fixed size: Qwen3-Next.

A head's state S [key_size, value_size] after a token with query q, key k and value v:

    S = g · S                    g = exp(-exp(A) · softplus(a + dt)), the token's decay
    S = S + k ⊗ β (v - Sᵀ k)     β = sigmoid(b), how much of what k stands for is replaced
    output = Sᵀ q

Before that q, k and v go through a causal convolution over the last few tokens, whose inputs are
the other part of the state. Everything is float32, and tokens are taken one by one in their order:
no bit depends on how a sequence was cut into steps or on what shares them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from workers import kernels
from workers.batch import Batch
from workers.layers.linear import ColumnLinear, Part, RowLinear, part_by_head
from workers.layers.memory import Memory
from workers.parallel import Group, Place
from workers.weights import Parameter

L2_EPS = 1e-6


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


class Sweep:
    """A step's rows as recurrent layers take them: the first token of each, then the second of each
    that has one, and so on. Made once for all layers, which have as many ``taps``.

    The convolutions read the rows end to end, each behind its last taps - 1 inputs before this step
    (its past): T + R * (taps - 1) lines in all.
    """

    def __init__(self, batch: Batch, taps: int) -> None:
        assert batch.states is not None
        starts, device = batch.query_starts.long(), batch.query_starts.device
        lengths, before = starts.diff(), taps - 1
        rows = torch.arange(len(lengths), device=device)
        self.states = batch.states.long()  # [R]
        row_of = rows.repeat_interleave(lengths)
        self.lines = torch.arange(len(row_of), device=device) + (row_of + 1) * before  # [T]
        firsts = (starts[:-1] + rows * before)[:, None]
        self.past = firsts + torch.arange(before, device=device)  # [R, taps - 1]
        self.next_past = self.past + lengths[:, None]
        longest_first = lengths.argsort(descending=True, stable=True)
        self.swept = self.states[longest_first]  # [R]
        starts_host, lengths_host = starts[longest_first].tolist(), lengths[longest_first].tolist()
        self.turns: list[slice] = []  # of the tokens in ``order``
        order: list[int] = []
        active = len(lengths_host)
        for turn in range(lengths_host[0]):
            while lengths_host[active - 1] <= turn:
                active -= 1
            self.turns.append(slice(len(order), len(order) + active))
            order += [start + turn for start in starts_host[:active]]
        self.order = torch.tensor(order, device=device)  # [T]


class GatedDeltaNet:
    """In attention's place: projections, convolution, recurrence, and a norm gated by z; ``output``
    is its last projection. The heads are split over the ranks."""

    def __init__(
        self, place: Place, name: str, hidden: int, traits: DeltaTraits, eps: float
    ) -> None:
        self._traits, self._eps, self._dtype = traits, eps, place.dtype
        keys, values = traits.split(place.group)
        self._heads = keys.stop - keys.start, values.stop - values.start
        key_cut, value_cut = _scaled(keys, traits.key_size), _scaled(values, traits.value_size)
        cuts = key_cut, key_cut, value_cut
        self._widths = [cut.stop - cut.start for cut in cuts]
        self._in = ColumnLinear(place, self._parts(name, keys, values, cuts), hidden, bias=False)
        width = traits.value_heads * traits.value_size
        self.output = RowLinear(place, f"{name}.out_proj", width, hidden, bias=False)

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=place.device)

        channels, mine = sum(self._widths), self._heads[1]
        self._kernel, self._norm = floats(channels, traits.taps), floats(traits.value_size)
        self._decay, self._dt = floats(mine), floats(mine)
        heads = (traits.value_heads,)
        self._parameters = [
            Parameter(f"{name}.norm.weight", (traits.value_size,), self._norm),
            Parameter(f"{name}.dt_bias", heads, self._dt, (values,)),
            Parameter(f"{name}.A_log", heads, self._decay, (values,), self._filled),
        ]
        targets = self._kernel.split_with_sizes(self._widths)
        for part, size, target, cut in zip("qkv", traits.widths, targets, cuts, strict=True):
            shape = size, traits.taps
            self._parameters.append(
                Parameter(f"{name}.conv1d_{part}.weight", shape, target, (cut, slice(None)))
            )
        past = (traits.taps - 1) * channels
        self._past = past
        size = past + mine * traits.key_size * traits.value_size
        self.memory = Memory(
            lambda n: torch.zeros(n, size, dtype=torch.float32, device=place.device),
            4 * size,
            state=True,
        )

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

    @staticmethod
    def _filled(decay: Tensor) -> None:
        decay.exp_().neg_()

    def parameters(self) -> Iterable[Parameter]:
        return chain(self._in.parameters(), self._parameters, self.output.parameters())

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """x [T, hidden] to the heads' [T, value heads * value size], for ``output``; the rows'
        states in ``cache`` go on."""
        traits, sweep = self._traits, batch.sweep
        heads, width = self._heads[1], self._widths[2]
        sizes = [sum(self._widths), width, heads, heads]
        mixed, z, b, a = self._in(x).float().split_with_sizes(sizes, 1)
        past = cache[:, : self._past].unflatten(1, (traits.taps - 1, sizes[0]))
        states = cache[:, self._past :].unflatten(1, (heads, traits.key_size, traits.value_size))
        q, k, v = self._convolve(mixed, past, sweep).split_with_sizes(self._widths, 1)
        q, k = self._keys(q), self._keys(k)
        decay = (self._decay * F.softplus(a + self._dt)).exp()
        v = v.unflatten(1, (heads, traits.value_size))
        y = _recur(states, q * traits.key_size**-0.5, k, v, decay, b.sigmoid(), sweep)
        y = kernels.rms_norm(y, self._norm, self._eps).flatten(1) * F.silu(z)
        return y.to(self._dtype)

    def _convolve(self, x: Tensor, past: Tensor, sweep: Sweep) -> Tensor:
        """silu of the causal convolutions of x [T, channels], each channel's own, behind ``past``
        [states, taps - 1, channels], which is moved on."""
        taps = self._traits.taps
        lines = x.new_empty(len(x) + sweep.past.numel(), x.shape[1])
        lines[sweep.past] = past[sweep.states]
        lines[sweep.lines] = x
        past[sweep.states] = lines[sweep.next_past]
        y = x * self._kernel[:, -1]
        for tap in range(1, taps):  # in one order, whatever the rows
            y += lines[sweep.lines - tap] * self._kernel[:, -1 - tap]
        return F.silu(y)

    def _keys(self, x: Tensor) -> Tensor:
        """q or k [T, key heads * key size], normed, once for each head of values: [T, heads, key
        size]."""
        keys, values = self._heads
        x = x.unflatten(1, (keys, self._traits.key_size))
        x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)
        return x.repeat_interleave(values // keys, 1)


def _recur(
    states: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, sweep: Sweep
) -> Tensor:
    """The recurrence over q, k [T, H, K], v [T, H, V], decay and beta [T, H]: outputs [T, H, V].
    ``states`` [states, H, K, V] go on."""
    state = states[sweep.swept]
    q, k, v, decay, beta = (x[sweep.order] for x in (q, k, v, decay, beta))
    q, k = q[..., None], k[..., None]
    decay, beta = decay[..., None, None], beta[..., None]
    found = torch.empty_like(v)
    for turn in sweep.turns:
        s = state[: turn.stop - turn.start]
        s *= decay[turn]
        change = (v[turn] - (s * k[turn]).sum(2)) * beta[turn]
        s += k[turn] * change[:, :, None]
        found[turn] = (s * q[turn]).sum(2)
    states[sweep.swept] = state
    y = torch.empty_like(found)
    y[sweep.order] = found
    return y


def _scaled(cut: slice, size: int) -> slice:
    return slice(cut.start * size, cut.stop * size)
