"""The products of experts: one after the other, or in one tensor for the kernels of a GPU.

Both are called with x [T, hidden], the weights, float32, and numbers of each token's experts, both
[T, chosen], and what ``shared`` experts add [T, hidden]. They give what this rank adds to the sum
over the group [T, hidden]. A token's experts are added in the order of their choice, so that no
token depends on another.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workers import kernels
from workers.layers.linear import ColumnLinear, Part, RowLinear
from workers.parallel import Group, Place
from workers.quantization.codes import Coded
from workers.quantization.rounding import Rounder
from workers.weights import Cut, Parameter

if TYPE_CHECKING:
    from workers.layers.experts import ExpertTraits


def split(place: Place, traits: "ExpertTraits") -> tuple[slice, Place]:
    """This rank's experts, and the place where each of them lives: all, on the group, or some of
    their own. Raises ConfigError, with the allowed sizes, if the group does not divide them."""
    if not place.expert_parallel:
        return slice(0, traits.count), place
    mine = place.group.split(traits.count, "the number of experts")
    return mine, replace(place, group=Group())


class LoopedExperts:
    """An expert is computed for its tokens alone; how many it gets is looked at on the host."""

    def __init__(self, place: Place, name: str, hidden: int, traits: "ExpertTraits") -> None:
        self._traits = traits
        self._mine, place = split(place, traits)
        cut = place.group.split(traits.inner, "the experts' intermediate size")
        self._gate_up: list[ColumnLinear] = []
        self._down: list[RowLinear] = []
        names = ("gate_proj", "up_proj") if traits.gated else ("up_proj",)
        for expert in range(self._mine.start, self._mine.stop):
            mlp = f"{name}.{expert}"
            parts = [Part(f"{mlp}.{part}", traits.inner, cut) for part in names]
            self._gate_up.append(ColumnLinear(place, parts, hidden, traits.bias))
            down = f"{mlp}.down_proj"
            self._down.append(RowLinear(place, down, traits.inner, hidden, traits.bias))

    def parameters(self) -> Iterable[Parameter]:
        products: list[ColumnLinear | RowLinear] = [*self._gate_up, *self._down]
        return chain.from_iterable(product.parameters() for product in products)

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor, shared: Tensor | None) -> Tensor:
        tokens, each = chosen.shape
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self._traits.count).tolist()
        outputs = x.new_zeros(tokens * each, x.shape[1])
        mine = order.split_with_sizes(counts)[self._mine]
        for pairs, gate_up, down in zip(mine, self._gate_up, self._down, strict=True):
            if len(pairs):
                outputs[pairs] = down.share(self._inner(gate_up, x[pairs // each]))
        total = torch.zeros_like(x, dtype=torch.float32)
        for column, output in enumerate(outputs.view(tokens, each, -1).unbind(1)):
            total += weights[:, column, None] * output
        return (total if shared is None else total + shared).to(x.dtype)

    def _inner(self, product: ColumnLinear, x: Tensor) -> Tensor:
        """The inner units of one expert [T, this rank's part]."""
        if not self._traits.gated:
            return product(x).relu_().square_()
        gate = self._traits.gate
        return product.gated(x, self._traits.activation) if gate is None else gate(product(x))


class StackedExperts:
    """The weights of all experts are one tensor for each product, and nothing is looked at on the
    host (workers/kernels/gpu/experts.py)."""

    def __init__(self, place: Place, name: str, hidden: int, traits: "ExpertTraits") -> None:
        self._traits, self._name = traits, name
        self._mine, place = split(place, traits)
        cut = place.group.split(traits.inner, "the experts' intermediate size")
        share, held = cut.stop - cut.start, self._mine.stop - self._mine.start

        def empty(*shape: int) -> Tensor:
            return torch.empty(held, *shape, dtype=place.dtype, device=place.device)

        width = 2 * share if traits.gated else share
        parts = ("gate_proj", "up_proj") if traits.gated else ("up_proj",)

        def named(*parts: str) -> list[str]:
            experts = range(self._mine.start, self._mine.stop)
            return [f"{name}.{expert}.{part}" for expert in experts for part in parts]

        into, out = place.rounder(named(*parts)), place.rounder(named("down_proj"), cut)
        self._gate_up = place.weight(named(*parts), width, hidden, None, held, into)
        self._down = place.weight(named("down_proj"), hidden, traits.inner, cut, held, out)
        # The bias of what is summed over the group is to be in the sum once.
        self._gate_up_bias = empty(width) if traits.bias else None
        self._down_bias = empty(hidden) if traits.bias and place.group.rank == 0 else None
        everything = slice(None)
        gate, up = slice(0, share), slice(width - share, width)
        rows = (traits.inner, hidden), (cut, everything)
        self._parameters = [
            *self._fill(
                place, "up_proj", *rows, self._gate_up[:, up], into, self._gate_up_bias, up
            ),
            *self._fill(
                place,
                "down_proj",
                (hidden, traits.inner),
                (everything, cut),
                self._down,
                out,
                self._down_bias,
            ),
        ]
        if traits.gated:
            self._parameters.extend(
                self._fill(
                    place,
                    "gate_proj",
                    *rows,
                    self._gate_up[:, gate],
                    into,
                    self._gate_up_bias,
                    gate,
                )
            )

    def _fill(
        self,
        place: Place,
        part: str,
        shape: tuple[int, int],
        cut: Cut,
        weights: Tensor | Coded,
        rounder: Rounder | None,
        biases: Tensor | None,
        at: slice = slice(None),
    ) -> Iterable[Parameter]:
        """The parameters that fill the ``cut`` of a linear layer of every expert."""
        for i, expert in enumerate(range(self._mine.start, self._mine.stop)):
            name = f"{self._name}.{expert}.{part}"
            yield from place.stored(Parameter(f"{name}.weight", shape, weights[i], cut), rounder)
            if biases is not None:
                yield Parameter(f"{name}.bias", shape[:1], biases[i, at], cut[:1])

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor, shared: Tensor | None) -> Tensor:
        from workers.kernels.gpu import experts

        gate, held = self._traits.gate, self._down.shape[0]
        order = experts.sort(chosen, self._mine.start, held, self._traits.count)
        inner = experts.product(
            x,
            self._gate_up,
            order,
            chosen.shape[1],
            self._gate_up_bias,
            gated=self._traits.gated and self._traits.activation == "silu",
            clamp=None if gate is None else (gate.alpha, gate.limit),
        )
        if not self._traits.gated:
            inner = inner.relu_().square_()
        elif self._traits.activation == "gelu_tanh":
            inner = kernels.gelu_mul(inner)
        y = experts.product(inner, self._down, order, 1, self._down_bias)
        return experts.combine(y, weights, chosen, self._mine.start, held, shared)
