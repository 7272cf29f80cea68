"""Slot tables: what a worker knows of the slots, a table for each thing that acts on them.

The sampling parameters are one; every extra that a request may bring (``engine.extras``) is
another, in a file of its own, and the worker's list is all that has to know of it.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from engine.plan import Admit, Ints

# Told the tokens [n] of the step's rows, once they are on the host, and what these force so far,
# as ``StepResult`` has it; says what more they force.
Forced = dict[int, list[int]]
Learn = Callable[[Ints, Forced], Forced]


class SlotTable(Protocol):
    """What is known of the slots, as far as they have it."""

    def admit(self, admit: Admit) -> None:
        """Take what the slot's new sequence brings; what the slot held before is gone. All of it
        must follow from ``admit``: a sequence that was preempted or moved comes again so."""
        ...

    def release(self, slot: int) -> None:
        """Forget the slot; one that has nothing here is left alone."""
        ...


class LogitsTable(SlotTable, Protocol):
    """One that changes logits before anything else looks at them; on the rank that samples."""

    @property
    def active(self) -> bool:
        """Whether any slot has something here: steps cost nothing as long as none has."""
        ...

    def warm_up(self, logits: Tensor) -> None:
        """Have at hand what the first one needs, kernels for such ``logits`` [n, V] among it."""
        ...

    def on_logits(self, logits: Tensor, slots: Ints, positions: Ints) -> Learn | None:
        """Change the rows of ``logits`` [n, V], in place, whose ``slots`` [n] have something here.

        positions: [n], the index in its sequence of the token to be sampled. Returns what wants to
        learn the tokens, if anything does.
        """
        ...
