"""A worker's device tables, one row for each slot, and how a plan's rows become a batch."""

import numpy as np
import torch
from torch import Tensor

from engine.plan import Ints, StepPlan, ints
from workers.batch import Batch


class Slots:
    """Tokens and block tables of the running sequences, kept current by the plans' changes."""

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.device = device
        self.tokens = torch.zeros(num_slots, max_model_len, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)

    def upload(self, values: Ints) -> Tensor:
        """A host array as a device tensor of int64, without waiting for the device."""
        tensor = torch.from_numpy(values).long()
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def update(self, plan: StepPlan) -> None:
        """Carry out what the plan says of admitted slots and new cells."""
        for admit in plan.admits:
            tokens = torch.from_numpy(admit.tokens)
            self.tokens[admit.slot, : len(admit.tokens)] = tokens.to(self.device)
        if len(plan.cells):
            slot, index, block = self.upload(plan.cells).unbind(1)
            self.block_tables[slot, index] = block.int()

    def learn(self, tokens: Ints) -> None:
        """Take [n, 3] (slot, position, token) into the table."""
        slot, position, token = self.upload(tokens).unbind(1)
        self.tokens[slot, position] = token.int()

    def sampled_after(self, plan: StepPlan) -> Tensor:
        """[n] int64: the tokens of ``plan``, laid end to end, that one is to be sampled after.

        If there are none, the last token: no kernel has to know of empty batches.
        """
        ends = np.cumsum(plan.counts) - 1
        found = ends[plan.wants == 1]
        return self.upload(ints(found if len(found) else ends[-1:]))

    def batch(self, plan: StepPlan, whole: bool = False) -> Batch:
        """The rows of ``plan`` laid end to end; ``whole``: all are carried to the network's end."""
        total, rows = plan.num_tokens, len(plan.slots)
        contexts = plan.starts + plan.counts
        slots, starts = self.upload(plan.slots), self.upload(plan.starts)
        if total == rows:  # decodes only
            row_slots, positions = slots, starts
            query_starts = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        else:
            counts = self.upload(plan.counts)
            ends = counts.cumsum(0)
            row = torch.repeat_interleave(
                torch.arange(rows, device=self.device), counts, output_size=total
            )
            row_slots = slots[row]
            positions = torch.arange(total, device=self.device) - (ends - counts - starts)[row]
            query_starts = torch.nn.functional.pad(ends, (1, 0)).int()
        blocks = self.block_tables[row_slots, positions // self.block_size].long()
        most = int(contexts.max())
        used = -(-most // self.block_size)
        everything = whole or plan.wants.sum() == total
        return Batch(
            tokens=self.tokens[row_slots, positions].long(),
            positions=positions,
            query_starts=query_starts,
            context_lens=self.upload(contexts).int(),
            block_tables=self.block_tables[slots, :used],
            cells=blocks * self.block_size + positions % self.block_size,
            max_query_len=int(plan.counts.max()),
            max_context_len=most,
            outputs=None if everything else self.sampled_after(plan),
        )
