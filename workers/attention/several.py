"""Backends side by side, of a model whose layers' heads are not all of one kind."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from torch import Tensor

from engine.plan import StepPlan
from workers.attention.base import Arrays, AttentionBackend, LayerAttention, Prologue
from workers.batch import Batch


class SeveralAttention:
    """What ``backends`` want of a step, one after the other; a layer is given one of ``parts``."""

    def __init__(self, backends: Sequence[AttentionBackend]) -> None:
        self.backends = backends
        self.shape = backends[0].shape
        self.parts = [_Part(backend, i) for i, backend in enumerate(backends)]
        self._counts = [len(backend.room(1, 1, True, 1)) for backend in backends]

    def arrays(self, plan: StepPlan) -> Arrays:
        return tuple(chain.from_iterable(backend.arrays(plan) for backend in self.backends))

    def room(self, rows: int, tokens: int, decodes: bool, max_context: int) -> tuple[int, ...]:
        rooms = (backend.room(rows, tokens, decodes, max_context) for backend in self.backends)
        return tuple(chain.from_iterable(rooms))

    def begin(self, batch: Batch, arrays: tuple[Tensor, ...]) -> list[Any]:
        """Each backend's own."""
        found = iter(arrays)
        return [
            backend.begin(batch, tuple(islice(found, count)))
            for backend, count in zip(self.backends, self._counts, strict=True)
        ]


class _Part:
    """One of several backends, as a layer sees it."""

    def __init__(self, backend: AttentionBackend, index: int) -> None:
        self.shape = backend.shape
        self.block_shape = backend.block_shape
        self.allocate = backend.allocate
        self._backend = backend
        self._index = index

    def attend(self, batch: Batch, cache: Tensor, qkv: Tensor, prologue: Prologue) -> Tensor:
        mine = replace(batch, attention=batch.attention[self._index])
        return self._backend.attend(mine, cache, qkv, prologue)


Backend = AttentionBackend | SeveralAttention


def part_of(backend: Backend, kind: int) -> LayerAttention:
    """The attention of layers whose heads are the model's ``kind``-th."""
    return backend.parts[kind] if isinstance(backend, SeveralAttention) else backend


def backends_of(backend: Backend) -> Sequence[AttentionBackend]:
    """The backends that it is made of."""
    return backend.backends if isinstance(backend, SeveralAttention) else [backend]
