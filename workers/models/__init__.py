"""The networks: ``read_traits`` says what a checkpoint is, ``build_model`` makes a rank's part."""

from workers.models.base import Model, Traits, attention_shapes
from workers.models.registry import build_model, read_traits

__all__ = ["Model", "Traits", "attention_shapes", "build_model", "read_traits"]
