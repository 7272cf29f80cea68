"""The KV blocks' memory in both tiers, and the copies between them."""

import time

import torch
from torch import Tensor

from engine.plan import Copies, Ints
from workers.attention.base import AttentionBackend


class KVCache:
    """Keys and values of this rank's layers: device blocks and CPU blocks of the same layout.

    ``layers[i]`` is the i-th layer's cache, a tensor [num_blocks, ...] as its backend lays it out.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        num_layers: int,
        num_device_blocks: int,
        num_cpu_blocks: int,
        device: torch.device,
    ) -> None:
        one = backend.allocate(1)
        shape, dtype = one.shape[1:], one.dtype
        # Not initialised: memory is taken only as blocks are written, and start-up stays short.
        self._device = torch.empty(
            num_layers, num_device_blocks, *shape, dtype=dtype, device=device
        )
        pinned = device.type == "cuda" and num_cpu_blocks > 0
        self._cpu = torch.empty(num_layers, num_cpu_blocks, *shape, dtype=dtype, pin_memory=pinned)
        self.layers: list[Tensor] = list(self._device.unbind(0))

    def copy(self, copies: Copies) -> None:
        """Carry out a plan's copies: out, then in, then within the device."""
        if len(copies.out):
            source, target = _columns(copies.out)
            self._cpu[:, target] = self._device[:, source.to(self._device.device)].cpu()
        if len(copies.in_):
            source, target = _columns(copies.in_)
            device = self._device.device
            self._device[:, target.to(device)] = self._cpu[:, source].to(device)
        if len(copies.within):
            source, target = (c.to(self._device.device) for c in _columns(copies.within))
            self._device[:, target] = self._device[:, source]

    def measure(self) -> tuple[float, float]:
        """(seconds to copy a block out, seconds to copy one in); blocks' contents are lost."""
        num = min(4, self._device.shape[1], self._cpu.shape[1])
        if num == 0:
            return float("inf"), float("inf")
        pairs = torch.arange(num, dtype=torch.int32)[:, None].expand(-1, 2).numpy()
        times = []
        for copies in (Copies(out=pairs), Copies(in_=pairs)):
            for _ in range(2):  # the first touches the memory
                start = time.perf_counter()
                self.copy(copies)
                if self._device.is_cuda:
                    torch.cuda.synchronize(self._device.device)
                seconds = (time.perf_counter() - start) / num
            times.append(seconds)
        return times[0], times[1]


def _columns(pairs: Ints) -> tuple[Tensor, Tensor]:
    source, target = torch.from_numpy(pairs).long().unbind(1)
    return source, target
