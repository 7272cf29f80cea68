"""Pooling of the slots: hidden states of a prompt, perhaps over several steps, to one vector."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Admit, Ints, StepPlan, ints
from engine.pooling import Method
from workers.sampler import HostCopy, start_copies
from workers.sampling_table import on_device


class PooledRow(NamedTuple):
    """A row of a plan whose hidden states count: the step's tokens ``at : at + num``.
    ``first``: they are the prompt's first ones, ``last``: its last ones."""

    row: int
    slot: int
    at: int
    num: int
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Vectors:
    """What became of the prompts that ended in a step."""

    rows: Ints  # [m], of the plan
    values: Tensor  # [m, V] float32, on the device

    def start_copy(
        self, stream: torch.cuda.Stream | None
    ) -> HostCopy[dict[int, NDArray[np.float32]]]:
        """By row, on the host; on CUDA copied on ``stream``, without waiting."""
        if stream is None:
            return HostCopy(self, lambda: self._by_row(self.values))
        (values,), event = start_copies((self.values,), stream)
        return HostCopy(self, lambda: self._by_row(values), event)

    def _by_row(self, values: Tensor) -> dict[int, NDArray[np.float32]]:
        return dict(zip(self.rows.tolist(), values.numpy(), strict=True))


class PoolingTable:
    """``gathers``: this rank has hidden states, and so keeps what pooling needs of earlier steps.

    Sums are in float64 and, on a CPU, in the order of the tokens: a prompt has one vector, however
    it is cut into steps.
    """

    def __init__(
        self, method: Method, num_slots: int, size: int, device: torch.device, gathers: bool
    ) -> None:
        self._method = method
        self._device = device
        self._lengths: dict[int, int] = {}  # of the prompts that are pooled, by slot
        self._kept: Tensor | None = None  # sums of hidden states, or the first one
        if gathers and method != "last":
            self._kept = torch.zeros(num_slots, size, dtype=torch.float64, device=device)

    def admit(self, admit: Admit) -> None:
        self.release(admit.slot)
        if admit.extras.pools:
            self._lengths[admit.slot] = admit.prompt_len
            if self._kept is not None:
                self._kept[admit.slot] = 0

    def release(self, slot: int) -> None:
        self._lengths.pop(slot, None)

    def rows(self, plan: StepPlan) -> list[PooledRow]:
        """The rows of ``plan`` whose hidden states count."""
        found: list[PooledRow] = []
        if not self._lengths:
            return found
        ends = np.cumsum(plan.counts)
        for row, slot in enumerate(plan.slots.tolist()):
            if (length := self._lengths.get(slot)) is None:
                continue
            start, count = int(plan.starts[row]), int(plan.counts[row])
            first, last = start == 0, start + count == length
            if last or self._method == "mean" or (first and self._method == "cls"):
                found.append(PooledRow(row, slot, int(ends[row]) - count, count, first, last))
        return found

    def pool(self, rows: list[PooledRow], hidden: Tensor) -> Vectors | None:
        """Take in a step's hidden states [T, H]; the vectors [m, H] of the prompts that end in it,
        if any do."""
        if self._kept is not None and self._method == "mean":
            slots = np.repeat([row.slot for row in rows], [row.num for row in rows])
            at = np.concatenate([np.arange(row.at, row.at + row.num) for row in rows])
            values = hidden[self._upload(at)].double()
            self._kept.index_add_(0, self._upload(slots), values)
        elif self._kept is not None and (firsts := [row for row in rows if row.first]):
            first = hidden[self._upload([row.at for row in firsts])]
            self._kept[self._upload([row.slot for row in firsts])] = first.double()
        ended = [row for row in rows if row.last]
        if not ended:
            return None
        if self._kept is None:
            vectors = hidden[self._upload([row.at + row.num - 1 for row in ended])]
        else:
            vectors = self._kept[self._upload([row.slot for row in ended])]
        if self._method == "mean":
            lengths = np.array([self._lengths[row.slot] for row in ended], np.float64)
            vectors = vectors / on_device(lengths, self._device)[:, None]
        return Vectors(ints([row.row for row in ended]), vectors.float())

    def _upload(self, values: object) -> Tensor:
        return on_device(ints(values), self._device)
