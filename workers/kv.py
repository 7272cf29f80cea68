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
        self.layers = [backend.allocate(num_device_blocks) for _ in range(num_layers)]
        shape = (num_cpu_blocks, *self.layers[0].shape[1:])
        # Not initialised: memory is taken only as blocks are written, and start-up stays short.
        self._cpu = [
            torch.empty(shape, dtype=self.layers[0].dtype, pin_memory=device.type == "cuda")
            for _ in range(num_layers)
        ]
        self._device = device

    def copy(self, copies: Copies) -> None:
        """Carry out a plan's copies: out, then in, then within the device."""
        if len(copies.out):
            source, target = self._columns(copies.out)
            for layer, cpu in zip(self.layers, self._cpu, strict=True):
                cpu[target.cpu()] = layer[source].cpu()
        if len(copies.in_):
            source, target = self._columns(copies.in_)
            for layer, cpu in zip(self.layers, self._cpu, strict=True):
                layer[target] = cpu[source.cpu()].to(self._device)
        if len(copies.within):
            source, target = self._columns(copies.within)
            for layer in self.layers:
                layer[target] = layer[source]

    def _columns(self, pairs: Ints) -> tuple[Tensor, Tensor]:
        source, target = torch.from_numpy(pairs).long().to(self._device).unbind(1)
        return source, target

    def measure(self) -> tuple[float, float]:
        """(seconds to copy a block out, seconds to copy one in); blocks' contents are lost."""
        num = min(4, len(self.layers[0]), len(self._cpu[0]))
        if num == 0:
            return float("inf"), float("inf")
        pairs = torch.arange(num, dtype=torch.int32)[:, None].expand(-1, 2).numpy()
        times = []
        for copies in (Copies(out=pairs), Copies(in_=pairs)):
            for _ in range(2):  # the first touches the memory
                start = time.perf_counter()
                self.copy(copies)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                seconds = (time.perf_counter() - start) / num
            times.append(seconds)
        return times[0], times[1]
