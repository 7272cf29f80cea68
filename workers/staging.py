"""A step's host arrays on their way to the device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.plan import Ints

ALIGNED = 4  # ints: what a vector load takes
IN_FLIGHT = 4  # steps whose arrays may still be on the way


class Staging:
    """Host arrays to device tensors, all of a step in one copy that nobody waits for; there is room
    for ``size`` ints.

    Arrays that come with the same ``room`` lie where those of any step before did, so that a
    captured step finds them. On a CPU the tensors of any other are the arrays themselves.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._target = torch.zeros(size, dtype=torch.int32, device=device)
        self._hosts = [
            (
                torch.zeros(size, dtype=torch.int32, pin_memory=True),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(IN_FLIGHT if self._on_gpu else 0)
        ]
        self._next = 0

    @staticmethod
    def needed(room: Sequence[int]) -> int:
        """Ints that arrays of so many elements take."""
        return sum(-(-size // ALIGNED) * ALIGNED for size in room)

    def upload(self, arrays: Sequence[Ints], room: Sequence[int] | None = None) -> list[Tensor]:
        """The arrays on the device, each with room for ``room`` elements behind its start; of the
        last one only what there is is copied."""
        if not self._on_gpu and room is None:
            return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        if room is None:
            room = [array.size for array in arrays]
        assert self.needed(room) <= len(self._target)
        host, free = self._target, None
        if self._on_gpu:
            host, free = self._hosts[self._next]
            self._next = (self._next + 1) % IN_FLIGHT
            free.synchronize()
        values = host.numpy()
        found: list[Tensor] = []
        at = end = 0
        for array, size in zip(arrays, room, strict=True):
            assert array.size <= size
            end = at + array.size
            values[at:end] = array.reshape(-1)
            shape = (size // array.shape[1], array.shape[1]) if array.ndim == 2 else (size,)
            found.append(self._target[at : at + size].view(shape))
            at += -(-size // ALIGNED) * ALIGNED
        if free is not None:
            self._target[:end].copy_(host[:end], non_blocking=True)
            free.record()
        return found
