"""What the sampling kernels know of each slot: one record, and the lists that it points to.

Records change when slots are admitted. All admits of a step go to the device in one copy from
pinned memory, which nobody waits for; a step without admits sends nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

RECORD = np.dtype(
    [
        ("seed", np.uint64),
        ("lists", np.int64),  # address of the slot's lists, one after the other, each int32:
        ("num_allowed", np.int32),  # allowed_token_ids
        ("num_stops", np.int32),  # tokens that must not come before ``stops_until``
        ("num_biases", np.int32),  # tokens, then as many values of float32
        ("num_words", np.int32),  # bad words backwards, each padded with -1 to ``longest``
        ("longest", np.int32),
        ("edited_until", np.int32),  # positions before this have their logits edited
        ("stops_until", np.int32),
        ("prompt_len", np.int32),
        ("penalized", np.int32),  # 0 or 1
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("greedy", np.int32),  # 0 or 1
        ("inverse_temperature", np.float32),
        ("top_k", np.int32),  # 0 is off
        ("top_p", np.float32),  # 1 is off
        ("min_p", np.float32),  # 0 is off
        ("log_min_p", np.float32),  # -inf is off
    ]
)
assert RECORD.itemsize % 8 == 0
WORDS = tl.constexpr(RECORD.itemsize // 4)


def word(name: str) -> tl.constexpr:
    """Which int32 of a record the field ``name`` is, or begins with."""
    assert RECORD.fields is not None
    return tl.constexpr(RECORD.fields[name][1] // 4)


class SlotRecords:
    """The records of all slots on the device."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        blank = np.zeros(num_slots, RECORD)
        blank["greedy"] = 1  # what pads a batch is as cheap as can be
        words = blank.view(np.int32).reshape(num_slots, -1)
        self.table = torch.from_numpy(words).to(device)  # [num_slots, WORDS] int32
        self._lists: list[Tensor | None] = [None] * num_slots  # keep what records point to alive
        self._waiting: dict[int, tuple[NDArray[Any], NDArray[np.int32]]] = {}

    def put(self, slot: int, fields: Mapping[str, Any], lists: NDArray[np.int32]) -> None:
        """Slot ``slot``'s record (RECORD's fields, but for "lists") and its lists, in place of
        those it had. They are sent by the next ``flush``."""
        record = np.zeros(1, RECORD)
        for name, value in fields.items():
            record[name] = value
        self._waiting[slot] = record, lists

    def clear(self, slot: int) -> None:
        """Lets go of the slot's lists; its record means nothing until it is put again."""
        self._waiting.pop(slot, None)
        self._lists[slot] = None

    def flush(self) -> None:
        """Sends what was put since the last time, without waiting for the device."""
        if not self._waiting:
            return
        records = np.concatenate([record for record, _ in self._waiting.values()])
        parts = [lists for _, lists in self._waiting.values()]
        slots = np.fromiter(self._waiting, np.int64, len(records))
        head = slots.nbytes + records.nbytes
        ends = head + 4 * np.cumsum([0, *map(len, parts)])
        device = self.table.device
        sent = torch.empty(int(ends[-1]) // 4, dtype=torch.int32, device=device)
        records["lists"] = sent.data_ptr() + ends[:-1]
        host = torch.empty(sent.shape, dtype=torch.int32, pin_memory=sent.is_cuda)
        words = [slots.view(np.int32), records.view(np.int32), *parts]
        np.concatenate(words, out=host.numpy())
        sent.copy_(host, non_blocking=True)
        rows = sent[2 * len(slots) : head // 4].view(len(slots), -1)
        self.table.index_copy_(0, sent[: 2 * len(slots)].view(torch.int64), rows)
        for slot, lists in zip(self._waiting, parts, strict=True):
            self._lists[slot] = sent if len(lists) else None
        self._waiting.clear()
