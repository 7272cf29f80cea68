"""What a layer keeps of the sequences, as those see it who allocate it, count it and copy it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """One layer's memory on one rank, in units that are copied whole by who knows no more of them.

    A unit is a block of tokens or, of a layer that has a ``state``, all that it keeps of one
    sequence. ``allocate(n)`` is a contiguous tensor [n, ...] of n units of ``unit_bytes`` each. All
    layers with blocks share one block table: a block has a unit in each of them.
    """

    allocate: Callable[[int], Tensor]
    unit_bytes: int
    state: bool = False


def nothing(device: torch.device) -> Memory:
    """Of a layer that keeps nothing."""
    return Memory(lambda n: torch.empty(n, 0, device=device), 0)
