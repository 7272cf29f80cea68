"""A mixture of experts in the MLP's place: a router gives each token to a few gated MLPs."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from workers.layers.linear import ColumnLinear, Part, ReplicatedLinear, RowLinear
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.weights import Parameter


@dataclass(frozen=True)
class ExpertTraits:
    """``count`` experts of ``inner`` units, of which a token gets ``chosen``; ``normed``: the
    weights of those sum to 1."""

    count: int
    chosen: int
    inner: int
    normed: bool


class Experts:
    """Σ weight · down(silu(gate(x)) · up(x)) over a token's experts, plus the residual (Mixtral,
    arXiv 2401.04088). The weights are the softmax of the router's outputs, in float32.

    An expert is computed for its tokens alone, and a token's experts are added in the order of
    their weights, so that no token depends on another. Every rank has a part of each expert's inner
    units. How many tokens an expert gets is looked at on the host.
    """

    def __init__(self, place: Place, name: str, hidden: int, traits: ExpertTraits) -> None:
        self._group = place.group
        self._traits = traits
        self._router = ReplicatedLinear(place, f"{name}.gate", hidden, traits.count)
        cut = place.group.split(traits.inner, "the experts' intermediate size")
        self._gate_up: list[ColumnLinear] = []
        self._down: list[RowLinear] = []
        for expert in range(traits.count):
            mlp = f"{name}.experts.{expert}"
            parts = [Part(f"{mlp}.{part}", traits.inner, cut) for part in ("gate_proj", "up_proj")]
            self._gate_up.append(ColumnLinear(place, parts, hidden, bias=False))
            self._down.append(
                RowLinear(place, f"{mlp}.down_proj", traits.inner, hidden, bias=False)
            )

    def parameters(self) -> Iterable[Parameter]:
        products: list[ColumnLinear | RowLinear] = [self._router, *self._gate_up, *self._down]
        return chain.from_iterable(product.parameters() for product in products)

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        return Stream(residual, self.update(x))

    def update(self, x: Tensor) -> Tensor:
        """What is added to the residual stream: x [T, hidden] to [T, hidden]."""
        weights, chosen = self._route(x)
        tokens, each = chosen.shape
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self._traits.count).tolist()
        outputs = x.new_empty(tokens * each, x.shape[1])
        for expert, pairs in enumerate(order.split_with_sizes(counts)):
            if len(pairs):
                inner = self._gate_up[expert].gated(x[pairs // each])
                outputs[pairs] = self._down[expert].share(inner)
        by_choice = outputs.view(tokens, each, -1).unbind(1)
        total = torch.zeros_like(x, dtype=torch.float32)
        for column, output in enumerate(by_choice):
            total += weights[:, column, None] * output
        return self._group.all_reduce(total.to(x.dtype))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, float32, and numbers of each token's experts, both [T, chosen]."""
        scores = self._router(x).float().softmax(-1)
        weights, chosen = scores.topk(self._traits.chosen, dim=-1)
        if self._traits.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen
