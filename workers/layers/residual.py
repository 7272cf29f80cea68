"""How a block stands in the residual stream: norms before and behind it, and its weight."""

from collections.abc import Iterable
from itertools import chain
from typing import Protocol

from torch import Tensor

from workers.layers.norm import RMSNorm
from workers.layers.stream import Stream
from workers.weights import Parameter


class Block(Protocol):
    """What ends in an update of the residual stream."""

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        """The stream ``residual`` with the update of x."""
        ...

    def update(self, x: Tensor) -> Tensor:
        """The update alone."""
        ...


class Residual:
    """stream += scale · after(block(before(stream))), either norm or none of them."""

    def __init__(
        self, before: RMSNorm | None, after: RMSNorm | None = None, scale: float = 1.0
    ) -> None:
        self._before, self._after, self._scale = before, after, scale

    def parameters(self) -> Iterable[Parameter]:
        norms = (norm for norm in (self._before, self._after) if norm is not None)
        return chain.from_iterable(norm.parameters() for norm in norms)

    def enter(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The block's input and the stream to which its update will be added, both [T, H]."""
        if self._before is None:
            total = stream.total()
            return total, total
        return self._before(stream), stream.hidden

    def leave(self, block: Block, x: Tensor, residual: Tensor) -> Stream:
        """The stream behind ``block``, whose last product is of x [T, K]."""
        if self._after is None and self._scale == 1:
            return block(x, residual)
        update = block.update(x)
        if self._after is not None:
            update = self._after(Stream(update))
        return Stream(residual, update if self._scale == 1 else update * self._scale)
