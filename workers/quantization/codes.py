"""A weight as small codes: value = (code - zero) · scale, rounded once to the type computed in.

There is one form, whatever the checkpoint's: scales of each output (row) and group of inputs
(columns). So a value is the same wherever it is computed: while the weights are loaded, or on GPUs
in the product (workers/kernels/gpu/coded.py).
"""

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import CheckpointError
from workers.quantization.rounding import Rounder

CHUNK = 1 << 22  # values that are computed at a time, in float32
HALF = 64  # columns whose 4-bit codes share bytes with the next as many


class Kind(Enum):
    """What a code is: an integer, or a float of 8 or 4 bits (E4M3; E2M1 of OCP's MX formats)."""

    INT8 = 0
    INT4 = 1
    E4M3 = 2
    E2M1 = 3

    @property
    def bits(self) -> int:
        return 4 if self in (Kind.INT4, Kind.E2M1) else 8

    @property
    def middle(self) -> int:
        """The zero of integers that have none of their own."""
        return {Kind.INT8: 128, Kind.INT4: 8}.get(self, 0)


@dataclass(frozen=True)
class Grouping:
    """The group of a column: (column + ``offset``) // ``size`` of ``count`` groups, or ``of`` [K]
    int32 where columns are not in order."""

    count: int
    size: int
    offset: int = 0
    of: Tensor | None = None

    def by_column(self, columns: int, device: torch.device) -> Tensor:
        """Each column's group [K] int32."""
        if self.of is not None:
            return self.of.to(device=device, dtype=torch.int32)
        at = torch.arange(columns, dtype=torch.int32, device=device)
        return (at + self.offset) // self.size


@dataclass(frozen=True)
class Codes:
    """A part of a weight [N, K] as it is loaded: ``codes`` uint8, one each; ``scales`` [N, G]
    float32; ``zeros`` [N, G] uint8, or None for the kind's middle."""

    kind: Kind
    codes: Tensor
    scales: Tensor
    grouping: Grouping
    zeros: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of a code: nobody's weight."""
        return self.codes.dtype

    def __getitem__(self, rows: Tensor | slice) -> "Codes":
        zeros = None if self.zeros is None else self.zeros[rows]
        return Codes(self.kind, self.codes[rows], self.scales[rows], self.grouping, zeros)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K]."""
        rows, columns = self.codes.shape
        groups = self.grouping.by_column(columns, self.codes.device)
        values = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            part = self[start : start + step]
            codes = part._numbers()
            if self.kind.middle:
                zeros = self.kind.middle if part.zeros is None else part.zeros[:, groups]
                codes -= zeros
            values[start : start + step] = codes.mul_(part.scales[:, groups])
        return values

    def _numbers(self) -> Tensor:
        """What the codes are as numbers, float32."""
        if self.kind is Kind.E4M3:
            return self.codes.view(torch.float8_e4m3fn).float()
        if self.kind is Kind.E2M1:
            positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=self.codes.device)
            return torch.cat((positive, -positive))[self.codes.int()]
        return self.codes.float()


class Coded:
    """A weight [N, K], or that of experts [E, N, K], that stays in codes on a GPU, for the kernels
    there.

    ``codes`` are [N, K] uint8 or, of 4 bits, [N, ⌈K / 128⌉ · 64]: byte 64 b + j holds column
    128 b + j, and column 128 b + 64 + j in its high half. ``scales``, of a type that has them
    exactly, and ``zeros`` are as in ``Codes``. ``groups`` [K] int32 is each column's group where a
    program's 64 columns may have several, else a group has ``group_size`` columns and the first
    ends ``offset`` early. ``rounder`` rounds what it is multiplied by, if anything does.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        shape: tuple[int, ...],
        grouping: Grouping,
        has_zeros: bool,
        dtype: torch.dtype,
        device: torch.device,
        scale_dtype: torch.dtype = torch.float32,
        rounder: Rounder | None = None,
    ) -> None:
        *rows, columns = shape
        self.name, self.rounder = name, rounder
        self.kind, self.dtype, self.device, self._columns = kind, dtype, device, columns
        width = columns if kind.bits == 8 else -(-columns // (2 * HALF)) * HALF
        self.codes = torch.empty(*rows, width, dtype=torch.uint8, device=device)
        self.scales = torch.empty(*rows, grouping.count, dtype=scale_dtype, device=device)
        self.zeros = torch.empty_like(self.scales, dtype=torch.uint8) if has_zeros else None
        self.group_size, self.offset = grouping.size, grouping.offset
        self.groups: Tensor | None = None
        self._reordered = grouping.of is not None
        if grouping.of is not None:
            self.groups = torch.full_like(grouping.of, -1, dtype=torch.int32, device=device)
        elif grouping.size % HALF or grouping.offset % HALF:
            self.groups = grouping.by_column(columns, device)

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.codes.shape[:-1], self._columns

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.groups)
        return sum(0 if tensor is None else tensor.nbytes for tensor in tensors)

    def __getitem__(self, at: int | slice | tuple[slice, ...]) -> "Coded":
        """A view of some rows or experts."""
        view = object.__new__(Coded)
        view.__dict__ |= self.__dict__
        view.codes, view.scales = self.codes[at], self.scales[at]
        view.zeros = None if self.zeros is None else self.zeros[at]
        return view

    def unpacked(self) -> Codes:
        """What a weight [N, K] was filled with."""
        codes = self.codes
        if self.kind.bits == 4:
            halves = codes.view(len(codes), -1, HALF)
            codes = torch.stack((halves & 15, halves >> 4), 2).flatten(1)[:, : self._columns]
        of = self.groups if self._reordered else None
        grouping = Grouping(self.scales.shape[1], self.group_size, self.offset, of)
        return Codes(self.kind, codes, self.scales.float(), grouping, self.zeros)

    def copy_(self, part: Codes) -> None:
        """Take over ``part``, of the same kind and shape. Raises CheckpointError if its columns are
        in other groups than those of the rows that were there before."""
        codes = part.codes
        if self.kind.bits == 4:
            whole = F.pad(codes, (0, 2 * self.codes.shape[1] - self._columns))
            low, high = whole.view(len(codes), -1, 2, HALF).unbind(2)
            codes = (low | high << 4).flatten(1)
        self.codes.copy_(codes)
        self.scales.copy_(part.scales)
        if self.zeros is not None:
            assert part.zeros is not None
            self.zeros.copy_(part.zeros)
        if part.grouping.of is not None:
            assert self.groups is not None
            if self.groups[0] >= 0 and not torch.equal(self.groups, part.grouping.of):
                raise CheckpointError(
                    f"the linears that are computed with {self.name} must have the same g_idx"
                )
            self.groups.copy_(part.grouping.of)
