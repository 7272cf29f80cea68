"""Norms over the last dimension, computed in float32."""

from collections.abc import Iterable

import torch
from torch import Tensor

from workers import kernels
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.weights import Parameter


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · (offset + weight) (arXiv 1910.07467).

    With an offset (Gemma) the sum is kept in float32: in 16 bits it would lose the weight's own.
    """

    def __init__(self, place: Place, name: str, size: int, eps: float, offset: float = 0.0) -> None:
        dtype = torch.float32 if offset else place.dtype
        self.weight = torch.empty(size, dtype=dtype, device=place.device)
        self._eps = eps
        self._offset = offset
        self._parameters = [Parameter(f"{name}.weight", (size,), self.weight, filled=self._filled)]

    def _filled(self, weight: Tensor) -> None:
        if self._offset:
            weight += self._offset

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, stream: Stream) -> Tensor:
        """The norm of the stream, whose update is added to ``stream.hidden`` in place."""
        return kernels.rms_norm(stream.hidden, self.weight, self._eps, stream.update, stream.bias)


class LayerNorm:
    """(x - mean) / sqrt(variance + eps) · weight + bias; 1 and 0 where not ``affine``."""

    def __init__(self, place: Place, name: str, size: int, eps: float, affine: bool) -> None:
        self.weight = torch.ones(size, dtype=place.dtype, device=place.device)
        self.bias = torch.zeros(size, dtype=place.dtype, device=place.device)
        self._eps = eps
        self._parameters = [
            Parameter(f"{name}.weight", (size,), self.weight),
            Parameter(f"{name}.bias", (size,), self.bias),
        ]
        if not affine:
            self._parameters = []

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, stream: Stream) -> Tensor:
        """The norm of the stream, whose update is added to ``stream.hidden`` in place."""
        return kernels.layer_norm(
            stream.hidden, self.weight, self.bias, self._eps, stream.update, stream.bias
        )


class WideNorm:
    """RMS norms of q and of k over all of their heads (Olmo 2), some of which are this rank's.

    Names, sizes (the whole widths) and cuts (this rank's part) are q's and k's. A part that several
    ranks hold counts once in the sum.
    """

    def __init__(
        self,
        place: Place,
        names: tuple[str, str],
        sizes: tuple[int, int],
        cuts: tuple[slice, slice],
        eps: float,
    ) -> None:
        self._group = place.group
        self._eps = eps
        self._sizes = sizes
        self._shares = [cut.stop - cut.start for cut in cuts]
        self._weights = [
            torch.empty(share, dtype=place.dtype, device=place.device) for share in self._shares
        ]
        self._parameters = [
            Parameter(f"{name}.weight", (size,), weight, (cut,))
            for name, size, weight, cut in zip(names, sizes, self._weights, cuts, strict=True)
        ]

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, qkv: Tensor) -> None:
        """Norms, in place, the first columns of qkv [T, N]: this rank's q, then its k."""
        parts = qkv.split_with_sizes([*self._shares, qkv.shape[1] - sum(self._shares)], 1)[:2]
        if self._group.size == 1:
            for x, weight in zip(parts, self._weights, strict=True):
                x.copy_(kernels.rms_norm(x, weight, self._eps))
            return
        copies = [
            self._group.size * share / size
            for share, size in zip(self._shares, self._sizes, strict=True)
        ]
        sums = [x.float().pow(2).sum(-1) / n for x, n in zip(parts, copies, strict=True)]
        totals = self._group.all_reduce(torch.stack(sums, 1)).unbind(1)
        for x, weight, total, size in zip(parts, self._weights, totals, self._sizes, strict=True):
            scale = torch.rsqrt(total / size + self._eps)[:, None]
            x.copy_(weight * (x.float() * scale).to(x.dtype))
