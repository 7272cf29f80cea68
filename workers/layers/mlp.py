"""The feed-forward blocks."""

from collections.abc import Iterable
from itertools import chain

from torch import Tensor

from workers.layers.linear import Activation, ColumnLinear, Gate, Part, RowLinear
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.weights import Parameter


class GatedMLP:
    """down(act(gate(x)) · up(x)) + residual, as in Llama; gate and up are one product."""

    def __init__(
        self,
        place: Place,
        name: str,
        hidden: int,
        inner: int,
        bias: bool,
        activation: Gate = "silu",
    ) -> None:
        self._activation: Gate = activation
        cut = place.group.split(inner, "intermediate_size")
        parts = [Part(f"{name}.{part}", inner, cut) for part in ("gate_proj", "up_proj")]
        self._gate_up = ColumnLinear(place, parts, hidden, bias, late_bias=True)
        self._down = RowLinear(place, f"{name}.down_proj", inner, hidden, bias)

    def parameters(self) -> Iterable[Parameter]:
        return chain(self._gate_up.parameters(), self._down.parameters())

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        return self._down(self._gate_up.gated(x, self._activation), residual)

    def update(self, x: Tensor) -> Tensor:
        """What is added to the residual stream [T, hidden]."""
        return self._down.update(self._gate_up.gated(x, self._activation))

    def share(self, x: Tensor) -> Tensor:
        """What this rank adds to the sum over the group [T, hidden]; of one without biases."""
        return self._down.share(self._gate_up.gated(x, self._activation))


class SquaredMLP:
    """down(relu(up(x))²) + residual (arXiv 2109.08668), as in Nemotron."""

    def __init__(self, place: Place, name: str, hidden: int, inner: int) -> None:
        part = Part(f"{name}.up_proj", inner, place.group.split(inner, "intermediate_size"))
        self._up = ColumnLinear(place, [part], hidden, False, "relu")
        self._down = RowLinear(place, f"{name}.down_proj", inner, hidden, bias=False)

    def parameters(self) -> Iterable[Parameter]:
        return chain(self._up.parameters(), self._down.parameters())

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        return self._down(self._up(x).square_(), residual)

    def share(self, x: Tensor) -> Tensor:
        """What this rank adds to the sum over the group [T, hidden]."""
        return self._down.share(self._up(x).square_())


class MLP:
    """fc2(act(fc1(x))) + residual, as in OPT; the activation is fused into the first product."""

    def __init__(
        self,
        place: Place,
        name: str,
        hidden: int,
        inner: int,
        bias: bool,
        activation: Activation,
    ) -> None:
        part = Part(f"{name}.fc1", inner, place.group.split(inner, "ffn_dim"))
        self._fc1 = ColumnLinear(place, [part], hidden, bias, activation)
        self._fc2 = RowLinear(place, f"{name}.fc2", inner, hidden, bias)

    def parameters(self) -> Iterable[Parameter]:
        return chain(self._fc1.parameters(), self._fc2.parameters())

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        return self._fc2(self._fc1(x), residual)
