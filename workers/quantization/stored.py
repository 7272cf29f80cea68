"""How a weight is stored: the checkpoint's tensors that together are its codes."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import ConfigError
from workers.quantization.codes import Coded, Codes, Grouping, Kind
from workers.quantization.rounding import Rounding
from workers.weights import FLOATS, Cut, Parameter


@dataclass(frozen=True)
class Stored:
    """A tensor of a weight, whose name is the linear's and ``leaf``. See ``Parameter``."""

    leaf: str
    shape: tuple[int, ...]
    cut: Cut = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    optional: bool = False


@dataclass(frozen=True)
class Part:
    """The part of the weight [N, K] of linear ``name`` that a rank has: ``rows`` and ``columns``,
    both with start and stop."""

    name: str
    shape: tuple[int, int]
    rows: slice
    columns: slice

    @staticmethod
    def of(parameter: Parameter) -> "Part":
        name, _, _ = parameter.name.rpartition(".")
        rows, columns = (
            slice(*cut.indices(size)[:2])
            for cut, size in zip(parameter.cut, parameter.shape, strict=True)
        )
        return Part(name, (parameter.shape[0], parameter.shape[1]), rows, columns)

    def words(self, dimension: int, each: int) -> slice:
        """The part of a dimension of which ``each`` values are packed into one.

        Raises ConfigError if they are values of different ranks.
        """
        total, cut = self.shape[dimension], (self.rows, self.columns)[dimension]
        if cut.start % each or (cut.stop % each and cut.stop != total):
            what = ("outputs", "inputs")[dimension]
            raise ConfigError(
                f"tensor_parallel_size cuts the {total} {what} of {self.name} into parts of"
                f" {cut.stop - cut.start}, which must be multiples of {each}: so many are packed"
                " together in the checkpoint"
            )
        return slice(cut.start // each, -(-cut.stop // each))

    def grouping(self, size: int | None) -> tuple[slice, Grouping]:
        """Which groups of ``size`` columns, or of all, it has a part of."""
        size = size or self.shape[1]
        cut = slice(self.columns.start // size, -(-self.columns.stop // size))
        count = cut.stop - cut.start
        return cut, Grouping(count, size, self.columns.start - cut.start * size)


class Format(Protocol):
    """A way to store a weight. A value: those of parts that are computed together are compared."""

    @property
    def kind(self) -> Kind:
        """Of the codes that it becomes."""
        ...

    @property
    def has_zeros(self) -> bool: ...

    @property
    def scale_dtype(self) -> torch.dtype:
        """That scales have exactly."""
        ...

    @property
    def height(self) -> int:
        """How many outputs share a scale or a word."""
        ...

    @property
    def rounding(self) -> Rounding | None:
        """Of what goes into the linear; None: it is taken as it is."""
        ...

    def grouping(self, part: Part) -> Grouping:
        """The groups of the part's columns; ``of`` says only whether it will be there."""
        ...

    def tensors(self, part: Part) -> list[Stored]:
        """What the checkpoint must have for it. Raises CheckpointError or ConfigError."""
        ...

    def decode(self, part: Part, tensors: dict[str, Tensor]) -> Codes:
        """The part, of the tensors that were there, by leaf. Raises CheckpointError."""
        ...


class StoredTensor(Parameter):
    """One of the tensors of ``weight``; the ``first`` of them counts for it."""

    def __init__(self, stored: Stored, assembly: "_Assembly", first: bool) -> None:
        super().__init__(
            f"{assembly.part.name}.{stored.leaf}",
            stored.shape,
            torch.empty(0, device=assembly.weight.target.device),
            stored.cut,
            dtypes=stored.dtypes,
            optional=stored.optional,
        )
        self._leaf, self._assembly, self._first = stored.leaf, assembly, first

    @property
    def nbytes(self) -> int:
        return self._assembly.weight.nbytes if self._first else 0

    @property
    def count(self) -> int:
        return self._assembly.weight.count if self._first else 0

    def absent(self) -> None:
        super().absent()
        self._assembly.take(self._leaf, None)

    def fill(self, part: Any) -> None:
        self._let_go()
        tensor = part if part.dtype in self.dtypes else part.to(self.dtypes[0])
        self._assembly.take(self._leaf, tensor)


@dataclass
class _Assembly:
    """A weight whose tensors come one by one."""

    format: Format
    part: Part
    weight: Parameter
    missing: set[str]
    found: dict[str, Tensor] = field(default_factory=dict)

    def take(self, leaf: str, tensor: Tensor | None) -> None:
        self.missing.remove(leaf)
        if tensor is not None:
            self.found[leaf] = tensor.to(self.weight.target.device)
        if self.missing:
            return
        codes = self.format.decode(self.part, self.found)
        self.found.clear()
        target = self.weight.target
        self.weight.fill(codes if isinstance(target, Coded) else codes.values(target.dtype))


def stored_as(format: Format, weight: Parameter) -> list[Parameter]:
    """The tensors of the checkpoint that, once all are there, fill ``weight``."""
    part = Part.of(weight)
    tensors = format.tensors(part)
    assembly = _Assembly(format, part, weight, {stored.leaf for stored in tensors})
    return [StoredTensor(stored, assembly, first=not i) for i, stored in enumerate(tensors)]
