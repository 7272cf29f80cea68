"""Attention backends: ``choose_backend`` picks the fastest that can serve a shape."""

from collections.abc import Sequence

from workers.attention.base import AttentionBackend, AttentionShape, Prologue
from workers.attention.cpu import CpuAttention
from workers.attention.gather import GatherAttention
from workers.attention.several import Backend, SeveralAttention
from workers.attention.triton import TritonAttention

__all__ = [
    "AttentionBackend",
    "AttentionShape",
    "Backend",
    "Prologue",
    "choose_backend",
    "choose_backends",
]

BACKENDS: dict[str, type[CpuAttention] | type[TritonAttention] | type[GatherAttention]] = {
    "triton": TritonAttention,
    "cpu": CpuAttention,
    "gather": GatherAttention,
}


def choose_backend(shape: AttentionShape, option: str = "auto") -> AttentionBackend:
    """The backend of the option ``attention_backend``; auto is the first of ``BACKENDS`` that can
    serve the shape. Raises ConfigError if the chosen one cannot."""
    if option == "auto":
        option = next(name for name, backend in BACKENDS.items() if backend.supports(shape))
    return BACKENDS[option](shape)


def choose_backends(shapes: Sequence[AttentionShape], option: str = "auto") -> Backend:
    """``choose_backend`` of each of a model's shapes."""
    backends = [choose_backend(shape, option) for shape in shapes]
    return backends[0] if len(backends) == 1 else SeveralAttention(backends)
