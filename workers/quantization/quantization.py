"""Which linears of a model are stored as codes, and where the codes are turned into numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import CheckpointError
from workers.kernels.memory import weight_tensor
from workers.quantization.codes import Coded, Grouping, Kind
from workers.quantization.rounding import INPUT_SCALE, InputScale, Rounder
from workers.quantization.stored import Format, Part, stored_as
from workers.weights import Parameter, Piece


@dataclass(frozen=True)
class Quantization:
    """``format_of`` gives a linear's format by its name, None for one that is not quantized.

    ``keeps`` says whether weights of a kind, in such groups, stay in codes, which the device's
    kernels multiply by; else they become numbers as they are loaded. ``description`` is for people,
    ``kept`` notes what quantized weights are kept as. Of tensors' names the last part may be
    another for the same thing (``renamed``), or mean nothing here (``beside``).
    """

    description: str = ""
    format_of: Callable[[str], Format | None] = lambda name: None
    renamed: Mapping[str, str] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    keeps: Callable[[Kind, Grouping], bool] = lambda kind, grouping: False
    kept: set[str] = field(default_factory=set, compare=False)

    def in_words(self) -> str:
        """For people: what is stored, and what it is kept as in memory."""
        kept = " and ".join(sorted(self.kept))
        return f"{self.description}, kept as {kept}" if kept else ""

    def weight(
        self,
        part: Part,
        names: Sequence[str],
        experts: int | None,
        device: torch.device,
        dtype: torch.dtype,
        rounder: Rounder | None = None,
    ) -> Tensor | Coded:
        """What ``part`` is to be filled with and multiplied by: of linears ``names`` together,
        whose outputs are its rows, of the inputs in its columns; or that for each of ``experts``.
        ``rounder`` is for codes to have, whose kernels round.
        """
        rows, columns = (cut.stop - cut.start for cut in (part.rows, part.columns))
        shape = (rows, columns) if experts is None else (experts, rows, columns)
        format = self.format_of(names[0])
        if format is not None and all(self.format_of(name) == format for name in names):
            grouping = format.grouping(part)
            # Each expert has an order of columns of its own.
            ordered = experts is None or grouping.of is None
            if ordered and self.keeps(format.kind, grouping):
                self.kept.add("codes")
                return Coded(
                    part.name,
                    format.kind,
                    shape,
                    grouping,
                    format.has_zeros,
                    dtype,
                    device,
                    format.scale_dtype,
                    rounder,
                )
        if format is not None:
            self.kept.add(str(dtype).removeprefix("torch."))
        return weight_tensor(shape, dtype, device)

    def rounder(self, names: Sequence[str], start: int, device: torch.device) -> Rounder | None:
        """Of the inputs, from ``start`` on, that go into linears ``names`` together: None if not
        all of them have the same format, or if that does not round."""
        format = self.format_of(names[0])
        rounding = None if format is None else format.rounding
        if rounding is None or any(self.format_of(name) != format for name in names):
            return None
        return Rounder(rounding, device, start % (rounding.group or 1))

    def stored(self, weight: Parameter, rounder: Rounder | None = None) -> list[Parameter]:
        """The checkpoint's tensors that fill the weight of a linear: itself, or its codes'; and
        the static scale of its inputs, if there is one, for ``rounder``."""
        name, _, _ = weight.name.rpartition(".")
        format = self.format_of(name)
        if format is None:
            return [weight]
        device, found = weight.target.device, stored_as(format, weight)
        if self._is_static(name):
            found.append(InputScale(name, device, rounder))
        return found

    def _is_static(self, name: str) -> bool:
        """Whether the inputs of linear ``name`` have a scale in the checkpoint."""
        format = self.format_of(name)
        return format is not None and format.rounding is not None and format.rounding.static

    def pieces(self, leaf: str, whole: Sequence[Piece]) -> list[Piece]:
        """What a tensor ``leaf`` of linears that are stored together holds of each of them, where
        their weight [N, K] is in the pieces ``whole``. Raises CheckpointError if they share scales.
        """
        found = []
        for piece in whole:
            name, _, _ = piece.name.rpartition(".")
            format, (rows, _) = self.format_of(name), piece.at
            if format is None or not isinstance(rows, slice):
                return []
            if rows.start % format.height:
                raise CheckpointError(
                    f"{name} begins at output {rows.start} of what it is stored in, which must be a"
                    f" multiple of {format.height}"
                )
            inputs = piece.shape[1]
            part = Part(name, (piece.shape[0], inputs), rows, slice(0, inputs))
            found += [
                Piece(f"{name}.{leaf}", stored.cut, stored.shape)
                for stored in format.tensors(part)
                if stored.leaf == leaf
            ]
            if leaf == INPUT_SCALE and self._is_static(name):
                found.append(Piece(f"{name}.{leaf}", (), ()))
        return found

    def canonical(self, name: str) -> str | None:
        """The parameter name of the tensor ``name``; None for one that means nothing."""
        module, _, leaf = name.rpartition(".")
        leaf = self.renamed.get(leaf, leaf)
        if leaf in self.beside or (leaf == INPUT_SCALE and not self._is_static(module)):
            return None
        return f"{module}.{leaf}" if module else name


PLAIN = Quantization()
