"""A worker's tables, a row for each slot, and what a plan's rows are in terms of them."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Ints, StepPlan, ints
from workers.sampling_table import on_device


class HostRows(NamedTuple):
    """A plan's R rows of T tokens, on the host, as int32."""

    slots: Ints  # [R]
    contexts: Ints  # [R], this step's tokens included
    starts: Ints  # [R + 1]: where each row's tokens begin
    token_slots: Ints  # [T]
    positions: Ints  # [T]
    outputs: Ints  # [n]: the tokens that one is to be sampled after; the last if there are none

    @classmethod
    def of(cls, plan: StepPlan) -> "HostRows":
        ends, total = np.cumsum(plan.counts), plan.num_tokens
        if total == len(ends):  # decodes only
            token_slots, positions = plan.slots, plan.starts
        else:
            row = np.repeat(np.arange(len(ends)), plan.counts)
            token_slots = plan.slots[row]
            positions = ints(np.arange(total) - (ends - plan.counts - plan.starts)[row])
        outputs = (ends - 1)[plan.wants == 1]
        return cls(
            slots=plan.slots,
            contexts=plan.starts + plan.counts,
            starts=ints(np.concatenate(([0], ends))),
            token_slots=token_slots,
            positions=positions,
            outputs=ints(outputs if len(outputs) else ends[-1:] - 1),
        )

    def padded(self, rows: int, tokens: int, spare: int) -> "HostRows":
        """As many rows (and outputs) and tokens as a captured step has. What is added reads and
        writes the slot ``spare`` alone; outputs that are added mean nothing."""
        return HostRows(
            slots=_pad(self.slots, rows, spare),
            contexts=_pad(self.contexts, rows, 1),
            starts=_pad(self.starts, rows + 1, self.starts[-1]),  # these have no tokens
            token_slots=_pad(self.token_slots, tokens, spare),
            positions=_pad(self.positions, tokens, 0),
            outputs=_pad(self.outputs, rows, 0),
        )


def _pad(values: Ints, size: int, value: int) -> Ints:
    padded = np.full(size, value, np.int32)
    padded[: len(values)] = values
    return padded


class Slots:
    """Tokens, block tables and states of the running sequences, kept current by the plans' changes.

    They have a row more than there are slots: ``spare``, whose blocks are ``spare_block``.
    """

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        spare_block: int,
        device: torch.device,
    ) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.spare = num_slots
        self.block_size = block_size
        self.device = device
        self.tokens = torch.zeros(num_slots + 1, max_model_len, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots + 1, max_blocks, dtype=torch.int32, device=device)
        self.block_tables[self.spare] = spare_block
        self.states = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)

    def upload(self, values: NDArray[np.int32]) -> Tensor:
        """A host array as a device tensor, without waiting for the device."""
        return on_device(values, self.device)

    def update(self, plan: StepPlan) -> None:
        """Carry out what the plan says of admitted slots, of tokens and of new cells."""
        for admit in plan.admits:
            self.tokens[admit.slot, : len(admit.tokens)] = self.upload(admit.tokens)
        if len(plan.told):
            self.learn(plan.told)
        if len(plan.cells):
            slot, index, block = self.upload(plan.cells).unbind(1)
            self.block_tables[slot, index] = block
        if plan.states is not None and len(plan.states.cells):
            slot, state = self.upload(plan.states.cells).unbind(1)
            self.states[slot] = state

    def learn(self, tokens: Ints) -> None:
        """Take [n, 3] (slot, position, token) into the table."""
        slot, position, token = self.upload(tokens).unbind(1)
        self.tokens[slot, position] = token
