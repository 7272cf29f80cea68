"""A mixture of experts in the MLP's place: a router gives each token to a few gated MLPs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from workers.layers.linear import ColumnLinear, Part, ReplicatedLinear, RowLinear
from workers.layers.mlp import GatedMLP
from workers.layers.routing import Router, Routing
from workers.layers.stream import Stream
from workers.parallel import Group, Place
from workers.weights import Parameter


@dataclass(frozen=True)
class SharedExpert:
    """A gated MLP ``name`` of ``inner`` units that every token gets; its output is multiplied by
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
        return ((up + 1) * gate * torch.sigmoid(self.alpha * gate)).to(gate_up.dtype)


@dataclass(frozen=True)
class ExpertTraits:
    """``count`` experts of ``inner`` units each, and one that is ``shared``.

    Between an expert's products is its ``gate``, else silu(gate) · up; all of them may have a
    ``bias``. ``interleaved``: in the checkpoint they are one tensor, whose matrices have gates and
    ups in turns and are transposed (gpt-oss).
    """

    count: int
    inner: int
    routing: Routing
    shared: SharedExpert | None = None
    gate: ClampedGate | None = None
    bias: bool = False
    interleaved: bool = False


class Experts:
    """Σ weight · down(act(gate(x)) · up(x)) over a token's experts, plus the residual (Mixtral,
    arXiv 2401.04088).

    An expert is computed for its tokens alone, and a token's experts are added in the order of
    their choice, so that no token depends on another. Every rank has a part of each expert's inner
    units or, ``expert_parallel``, some of the experts. How many tokens an expert gets is looked at
    on the host.
    """

    def __init__(self, place: Place, name: str, hidden: int, traits: ExpertTraits) -> None:
        self._group = place.group
        self._traits = traits
        self._router = Router(place, name, hidden, traits.count, traits.routing)
        shared = traits.shared
        self._shared = None if shared is None else _Shared(place, name, hidden, shared)
        self._mine = slice(0, traits.count)
        if place.expert_parallel:
            self._mine = place.group.split(traits.count, "the number of experts")
            place = replace(place, group=Group())
        cut = place.group.split(traits.inner, "the experts' intermediate size")
        self._gate_up: list[ColumnLinear] = []
        self._down: list[RowLinear] = []
        for expert in range(self._mine.start, self._mine.stop):
            mlp = f"{name}.experts.{expert}"
            parts = [Part(f"{mlp}.{part}", traits.inner, cut) for part in ("gate_proj", "up_proj")]
            self._gate_up.append(ColumnLinear(place, parts, hidden, traits.bias))
            down = f"{mlp}.down_proj"
            self._down.append(RowLinear(place, down, traits.inner, hidden, traits.bias))

    def parameters(self) -> Iterable[Parameter]:
        shared = () if self._shared is None else self._shared.parameters()
        products: list[ColumnLinear | RowLinear] = [*self._gate_up, *self._down]
        experts = chain.from_iterable(product.parameters() for product in products)
        return chain(self._router.parameters(), shared, experts)

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        return Stream(residual, self.update(x))

    def update(self, x: Tensor) -> Tensor:
        """What is added to the residual stream: x [T, hidden] to [T, hidden]."""
        weights, chosen = self._router(x)
        tokens, each = chosen.shape
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self._traits.count).tolist()
        outputs = x.new_zeros(tokens * each, x.shape[1])
        mine = order.split_with_sizes(counts)[self._mine]
        for pairs, gate_up, down in zip(mine, self._gate_up, self._down, strict=True):
            if len(pairs):
                outputs[pairs] = down.share(self._inner(gate_up, x[pairs // each]))
        by_choice = outputs.view(tokens, each, -1).unbind(1)
        total = torch.zeros_like(x, dtype=torch.float32)
        for column, output in enumerate(by_choice):
            total += weights[:, column, None] * output
        if self._shared is not None:
            total += self._shared.share(x)
        return self._group.all_reduce(total.to(x.dtype))

    def _inner(self, product: ColumnLinear, x: Tensor) -> Tensor:
        """The inner units of one expert [T, this rank's part]."""
        gate = self._traits.gate
        return product.gated(x) if gate is None else gate(product(x))


class _Shared:
    """The expert that every token gets."""

    def __init__(self, place: Place, name: str, hidden: int, traits: SharedExpert) -> None:
        self._mlp = GatedMLP(place, f"{name}.{traits.name}", hidden, traits.inner, bias=False)
        self._gate = traits.gate and ReplicatedLinear(place, f"{name}.{traits.gate}", hidden, 1)

    def parameters(self) -> Iterable[Parameter]:
        gate = self._gate.parameters() if self._gate else ()
        return chain(self._mlp.parameters(), gate)

    def share(self, x: Tensor) -> Tensor:
        """What this rank adds to the sum over the group [T, hidden]."""
        y = self._mlp.share(x)
        return torch.sigmoid(self._gate(x)) * y if self._gate else y
