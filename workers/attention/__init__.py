"""Attention backends: ``choose_backend`` picks the fastest that can serve a shape."""

from workers.attention.base import AttentionBackend, AttentionShape, Prologue
from workers.attention.cpu import CpuAttention
from workers.attention.gather import GatherAttention
from workers.attention.triton import TritonAttention

__all__ = ["AttentionBackend", "AttentionShape", "Prologue", "choose_backend"]

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
