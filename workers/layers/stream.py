"""The residual stream between the blocks of a network."""

from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """``hidden`` [T, H], and what is still to be added to it: ``update`` [T, H] and ``bias`` [H].

    On a GPU the addition is the next norm's, which has to read and write the stream anyway; on a
    CPU it is part of the product that makes the update.
    """

    hidden: Tensor
    update: Tensor | None = None
    bias: Tensor | None = None

    def total(self) -> Tensor:
        """The stream with everything added."""
        if self.update is None:
            return self.hidden
        update = self.update if self.bias is None else self.update + self.bias
        return self.hidden + update
