"""Norms over the last dimension, computed in float32."""

from collections.abc import Iterable

import torch
from torch import Tensor

from workers import kernels
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.weights import Parameter


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight (arXiv 1910.07467)."""

    def __init__(self, place: Place, name: str, size: int, eps: float) -> None:
        self.weight = torch.empty(size, dtype=place.dtype, device=place.device)
        self._eps = eps
        self._parameters = [Parameter(f"{name}.weight", (size,), self.weight)]

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
