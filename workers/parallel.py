"""Groups of ranks. A layer is given its group when it is built; a group of one costs nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """Ranks that compute together. This class is the group of one: every verb is the identity.

    Groups over torch.distributed override the verbs; ``size`` and ``rank`` say who is who.
    """

    size: int = 1
    rank: int = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``; may be done in place."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's ``x`` concatenated along the last dimension, in rank order."""
        return x

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """``x`` of rank ``source``."""
        return x

    def split(self, total: int, what: str) -> slice:
        """This rank's even share of ``total``.

        Raises ConfigError, naming ``what`` and the allowed sizes, if it does not divide evenly.
        """
        if total % self.size:
            allowed = [n for n in range(1, total + 1) if total % n == 0 and n <= 64]
            raise ConfigError(
                f"tensor_parallel_size={self.size} does not divide {what} ({total}); "
                f"allowed: {', '.join(map(str, allowed))}"
            )
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: layers ``start`` to ``stop`` of ``total``; a rank builds no others."""

    start: int
    stop: int
    total: int

    @property
    def first(self) -> bool:
        return self.start == 0

    @property
    def last(self) -> bool:
        return self.stop == self.total

    @staticmethod
    def whole(total: int) -> "Stage":
        return Stage(0, total, total)


@dataclass(frozen=True)
class Place:
    """Where a model's parameters live: everything a layer needs to build itself."""

    device: torch.device
    dtype: torch.dtype
    group: Group = Group()
