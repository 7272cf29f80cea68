"""A mixture of experts in the MLP's place: a router gives each token to a few MLPs."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from workers import kernels
from workers.layers.expert_products import LoopedExperts, StackedExperts
from workers.layers.linear import Gate, ReplicatedLinear
from workers.layers.mlp import GatedMLP, SquaredMLP
from workers.layers.routing import Router, Routing
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.weights import Parameter


@dataclass(frozen=True)
class SharedExpert:
    """An MLP ``name`` of ``inner`` units that every token gets; its output is multiplied by
    the sigmoid of the linear layer ``gate``, if there is one."""

    inner: int
    name: str = "shared_experts"
    gate: str | None = None


@dataclass(frozen=True)
class ClampedGate:
    """(up + 1) · gate · sigmoid(alpha · gate), where gate is at most ``limit`` and up within it on
    either side (gpt-oss)."""

    alpha: float
    limit: float

    def __call__(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 I], gate before up, to [T, I]."""
        gate, up = gate_up.float().chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return ((up + 1) * gate * kernels.sigmoid(self.alpha * gate)).to(gate_up.dtype)


@dataclass(frozen=True)
class ExpertTraits:
    """``count`` experts of ``inner`` units each, and one that is ``shared``.

    Between an expert's products is its ``gate``, else ``activation``(gate) · up or, if it is not
    ``gated``, relu(up)²; all of them may have a ``bias``. ``latent`` is the width of what they read
    and write, with projections in and out (Nemotron 3 Super), if that is not the residual stream's.
    ``interleaved``: in the checkpoint they are one tensor, whose matrices have gates and ups in
    turns and are transposed (gpt-oss).
    """

    count: int
    inner: int
    routing: Routing
    shared: SharedExpert | None = None
    gate: ClampedGate | None = None
    activation: Gate = "silu"
    gated: bool = True
    latent: int | None = None
    bias: bool = False
    interleaved: bool = False


class Experts:
    """Σ weight · down(act(gate(x)) · up(x)) over a token's experts, plus the residual (Mixtral,
    arXiv 2401.04088). Every rank has a part of each expert's inner units or, ``expert_parallel``,
    some of the experts.
    """

    def __init__(self, place: Place, name: str, hidden: int, traits: ExpertTraits) -> None:
        self._group = place.group
        self._router = Router(place, name, hidden, traits.count, traits.routing)
        shared = traits.shared
        self._shared: _Shared | None = None
        if shared is not None:
            self._shared = _Shared(place, name, hidden, shared, traits.gated)
        self._latent: list[ReplicatedLinear] = []
        if traits.latent is not None:
            self._latent = [
                ReplicatedLinear(place, f"{name}.fc1_latent_proj", hidden, traits.latent),
                ReplicatedLinear(place, f"{name}.fc2_latent_proj", traits.latent, hidden),
            ]
        kind = StackedExperts if kernels.has_triton(place.device) else LoopedExperts
        self._experts = kind(place, f"{name}.experts", traits.latent or hidden, traits)

    def parameters(self) -> Iterable[Parameter]:
        shared = () if self._shared is None else self._shared.parameters()
        latent = chain.from_iterable(linear.parameters() for linear in self._latent)
        return chain(self._router.parameters(), shared, latent, self._experts.parameters())

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        return Stream(residual, self.update(x))

    def update(self, x: Tensor, routed: Tensor | None = None) -> Tensor:
        """What is added to the residual stream: x [T, hidden] to [T, hidden]. The router looks at
        ``routed``, if that is another than x."""
        weights, chosen = self._router(x if routed is None else routed)
        shared = None if self._shared is None else self._shared.share(x)
        if not self._latent:
            return self._group.all_reduce(self._experts(x, weights, chosen, shared))
        into, out = self._latent
        y = out(self._experts(into(x), weights, chosen, None))
        return self._group.all_reduce(y if shared is None else y + shared)


class _Shared:
    """The expert that every token gets."""

    def __init__(
        self, place: Place, name: str, hidden: int, traits: SharedExpert, gated: bool
    ) -> None:
        mlp = f"{name}.{traits.name}"
        self._mlp: GatedMLP | SquaredMLP
        if gated:
            self._mlp = GatedMLP(place, mlp, hidden, traits.inner, bias=False)
        else:
            self._mlp = SquaredMLP(place, mlp, hidden, traits.inner)
        self._gate: ReplicatedLinear | None = None
        if traits.gate is not None:
            self._gate = ReplicatedLinear(place, f"{name}.{traits.gate}", hidden, 1)

    def parameters(self) -> Iterable[Parameter]:
        gate = () if self._gate is None else self._gate.parameters()
        return chain(self._mlp.parameters(), gate)

    def share(self, x: Tensor) -> Tensor:
        """What this rank adds to the sum over the group [T, hidden]."""
        y = self._mlp.share(x)
        return y if self._gate is None else kernels.sigmoid(self._gate(x)) * y
