"""Attention backends: ``choose_backend`` picks the fastest that can serve a shape."""

from workers.attention.base import AttentionBackend, AttentionShape
from workers.attention.cpu import CpuAttention
from workers.attention.gather import GatherAttention

__all__ = ["AttentionBackend", "AttentionShape", "choose_backend"]


def choose_backend(shape: AttentionShape, option: str = "auto") -> AttentionBackend:
    """The backend of the option ``attention_backend``; auto is CpuAttention where it can serve
    the shape, else GatherAttention. Raises ConfigError if the chosen one cannot serve it."""
    if option == "auto":
        option = "cpu" if CpuAttention.supports(shape) else "gather"
    return CpuAttention(shape) if option == "cpu" else GatherAttention(shape)
