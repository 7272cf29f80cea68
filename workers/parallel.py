"""Groups of ranks. A layer is given its group when it is built; a group of one costs nothing."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import ConfigError
from workers.quantization.codes import Coded
from workers.quantization.quantization import PLAIN, Quantization
from workers.quantization.rounding import Rounder
from workers.quantization.stored import Part
from workers.weights import Parameter


@dataclass(frozen=True)
class Group:
    """Ranks that compute together. This class is the group of one: every verb is the identity.

    Groups over torch.distributed override the verbs; ``size`` and ``rank`` say who is who.
    """

    size: int = 1
    rank: int = 0

    @property
    def capturable(self) -> bool:
        """Whether the verbs can be part of a CUDA graph."""
        return True

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``; may be done in place."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """On rank 0 every rank's ``x`` concatenated along the last dimension, in rank order; the
        others get their own ``x`` back."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """``x`` of rank 0; on the others ``x`` says shape and type, and may be written to."""
        return x

    def split(self, total: int, what: str) -> slice:
        """This rank's even share of ``total``.

        Raises ConfigError, naming ``what`` and the allowed sizes, if it does not divide evenly.
        """
        if total % self.size:
            allowed = [n for n in range(1, total + 1) if total % n == 0 and n <= 64]
            raise ConfigError(
                f"tensor_parallel_size={self.size} does not divide {what} ({total}); "
                f"allowed: {', '.join(map(str, allowed))}"
            )
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: layers ``start`` to ``stop`` of ``total``; a rank builds no others."""

    start: int
    stop: int
    total: int

    @property
    def first(self) -> bool:
        return self.start == 0

    @property
    def last(self) -> bool:
        return self.stop == self.total

    @staticmethod
    def whole(total: int) -> "Stage":
        return Stage(0, total, total)

    @staticmethod
    def split(total: int, size: int, partition: Sequence[int] = ()) -> "list[Stage]":
        """The ``size`` stages of a model, of ``partition`` layers each, or as even as can be: the
        last ones are the shorter, for the output layer is theirs.

        Raises ConfigError if there are more stages than layers or the partition does not add up.
        """
        if size > total:
            raise ConfigError(
                f"pipeline_parallel_size={size}: the model has {total} layers, so at most {total}"
            )
        counts = partition or [total // size + (i < total % size) for i in range(size)]
        if len(counts) != size or sum(counts) != total or min(counts) < 1:
            raise ConfigError(
                f"pipeline_partition={','.join(map(str, counts))}: must be {size} numbers of at"
                f" least 1 whose sum is the model's number of layers ({total})"
            )
        ends = list(itertools.accumulate(counts))
        return [Stage(end - count, end, total) for count, end in zip(counts, ends, strict=True)]


class Pipeline(Protocol):
    """A rank's way to its fellows in the stages before and after."""

    def send(self, hidden: Tensor) -> None:
        """Pass [T, H] to the next stage, without waiting for it to take it."""
        ...

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """[T, H] from the stage before."""
        ...


@dataclass(frozen=True)
class Ranks:
    """A rank's place in the grid (pipeline × tensor) and its ways to the others.

    ``pipeline`` is None where there is one stage.
    """

    group: Group = Group()
    stage: int = 0
    num_stages: int = 1
    pipeline: Pipeline | None = None


@dataclass(frozen=True)
class Place:
    """Where a model's parameters live: everything a layer needs to build itself.

    ``expert_parallel``: each rank has some of a layer's experts whole, rather than a part of each.
    ``products`` are the names and weights of its matrix products on CUDA: [N, K], or of experts
    [experts, N, K]. ``quantization`` says how the checkpoint stores the weights of linears."""

    device: torch.device
    dtype: torch.dtype
    group: Group = Group()
    expert_parallel: bool = False
    products: list[tuple[str, Tensor | Coded]] = field(default_factory=list)
    quantization: Quantization = PLAIN

    def weight(
        self,
        names: Sequence[str],
        outputs: int,
        inputs: int,
        cut: slice | None = None,
        experts: int | None = None,
        rounder: Rounder | None = None,
    ) -> Tensor | Coded:
        """The weight of linears ``names`` of the same ``inputs``, of which this rank has ``cut``,
        with ``outputs`` here, to be filled and multiplied by: [N, K], or [experts, N, K]. Codes
        have the ``rounder`` of what they are multiplied by."""
        part = Part(names[0], (outputs, inputs), slice(0, outputs), cut or slice(0, inputs))
        quantization = self.quantization
        weight = quantization.weight(part, names, experts, self.device, self.dtype, rounder)
        self.add_product(names[0], weight)
        return weight

    def floats(self, *shape: int) -> Tensor:
        """A tensor to be filled that is float32, whatever the model's type."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def rounder(self, names: Sequence[str], cut: slice | None = None) -> Rounder | None:
        """What rounds the inputs, of which this rank has ``cut``, of linears ``names``."""
        return self.quantization.rounder(names, cut.start if cut else 0, self.device)

    def stored(self, weight: Parameter, rounder: Rounder | None = None) -> list[Parameter]:
        """What the checkpoint has for the weight of a linear: itself, unless it is quantized.
        ``rounder`` is told the static scale of the linear's inputs."""
        return self.quantization.stored(weight, rounder)

    def add_product(self, name: str, weight: Tensor | Coded) -> None:
        """A layer multiplies by ``weight``; kept of those on CUDA, where it has to be tried."""
        if self.device.type == "cuda":
            self.products.append((name, weight))
