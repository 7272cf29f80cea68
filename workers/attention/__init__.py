"""Attention backends: ``choose_backend`` picks the fastest that can serve a shape."""

from workers.attention.base import AttentionBackend, AttentionShape
from workers.attention.cpu import CpuAttention
from workers.attention.gather import GatherAttention

__all__ = ["AttentionBackend", "AttentionShape", "choose_backend"]


def choose_backend(shape: AttentionShape) -> AttentionBackend:
    """CpuAttention where it can serve the shape, else GatherAttention."""
    return CpuAttention(shape) if CpuAttention.supports(shape) else GatherAttention(shape)
