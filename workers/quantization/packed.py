"""Integers of 4 or 8 bits packed into 32-bit words, with scales of groups of inputs: GPTQ
(AutoGPTQ, GPTQModel), AWQ (AutoAWQ's gemm) and compressed-tensors' pack-quantized.

A word holds eight codes of 4 bits or four of 8; the shapes below are those of 4 bits.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import CheckpointError
from workers.quantization.codes import Codes, Grouping, Kind
from workers.quantization.rounding import Rounding
from workers.quantization.stored import Part, Stored

# Of AWQ's word the half byte i, from the lowest on, is output AWQ_ORDER[i] of eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORDS = (torch.int32,)
INTEGERS = (torch.int32, torch.int64)
MX_GROUP = 32  # inputs that share a scale in OCP's MX formats


def unpack(words: Tensor, bits: int) -> Tensor:
    """The codes [..., n · 32 / bits] uint8 in words [..., n] int32, from the lowest bits on."""
    codes = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def e8m0(scales: Tensor) -> Tensor:
    """What exponents [...] uint8 stand for, float32: powers of two."""
    return scales.view(torch.float8_e8m0fnu).float()


@dataclass(frozen=True)
class Grouped:
    """Integers of ``bits`` with a scale for each output and ``group`` of inputs, None being all;
    ``reordered``: the checkpoint says which group an input is in."""

    bits: int
    group: int | None
    reordered: bool = False
    has_zeros: bool = True
    scale_dtype: torch.dtype = torch.float32
    rounding: Rounding | None = None

    @property
    def kind(self) -> Kind:
        return Kind.INT4 if self.bits == 4 else Kind.INT8

    @property
    def each(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    @property
    def height(self) -> int:
        return self.each

    def grouping(self, part: Part) -> Grouping:
        return self.cut(part)[1]

    def cut(self, part: Part) -> tuple[slice, Grouping]:
        """The groups that the part has columns of."""
        if not self.reordered:
            return part.grouping(self.group)
        count = self.groups(part)
        of = torch.empty(part.columns.stop - part.columns.start, dtype=torch.int32)
        return slice(0, count), Grouping(count, self.group or part.shape[1], of=of)

    def groups(self, part: Part) -> int:
        """How many the whole weight has. Raises CheckpointError if the last is cut off."""
        inputs = part.shape[1]
        if self.group and inputs % self.group:
            raise CheckpointError(
                f"group_size={self.group} does not divide the {inputs} inputs of {part.name}"
            )
        return inputs // (self.group or inputs)

    def in_order(self, part: Part, of: Tensor | None, leaf: str) -> Grouping:
        """The part's groups, where the checkpoint's tensor ``leaf`` says ``of`` [K]. Raises
        CheckpointError if it must not say that."""
        cut, grouping = self.cut(part)
        if of is None:
            return grouping
        of, name = of.int(), f"{part.name}.{leaf}"
        if not self.reordered:
            if torch.equal(of - cut.start, grouping.by_column(len(of), of.device)):
                return grouping
            raise CheckpointError(f"{name} is not in order, which desc_act=false says it is")
        if of.min() < 0 or of.max() >= grouping.count:
            raise CheckpointError(f"{name} must hold groups from 0 to {grouping.count - 1}")
        return replace(grouping, of=of)


def check_words(part: Part, each: int, *dimensions: int) -> None:
    """Raises CheckpointError if words of ``each`` codes do not hold those dimensions."""
    for dimension in dimensions:
        if part.shape[dimension] % each:
            what = ("outputs", "inputs")[dimension]
            raise CheckpointError(
                f"{part.name} has {part.shape[dimension]} {what}, which must be a multiple of"
                f" {each} in this format"
            )


@dataclass(frozen=True)
class Gptq(Grouped):
    """``qweight`` [K / 8, N] packed along K, ``qzeros`` [G, N / 8] along N, ``scales`` [G, N],
    ``g_idx`` [K]. Zeros are stored less ``zero_offset``."""

    zero_offset: int = 1

    def tensors(self, part: Part) -> list[Stored]:
        (rows, columns), groups, each = part.shape, self.groups(part), self.each
        check_words(part, each, 0, 1)
        packed_rows, packed_columns, cut = part.words(0, each), part.words(1, each), self.cut(part)
        return [
            Stored("qweight", (columns // each, rows), (packed_columns, part.rows), WORDS),
            Stored("qzeros", (groups, rows // each), (cut[0], packed_rows), WORDS),
            Stored("scales", (groups, rows), (cut[0], part.rows)),
            Stored("g_idx", (columns,), (part.columns,), INTEGERS, optional=not self.reordered),
        ]

    def decode(self, part: Part, tensors: dict[str, Tensor]) -> Codes:
        codes = unpack(tensors["qweight"].t(), self.bits)
        zeros = unpack(tensors["qzeros"], self.bits).t() + self.zero_offset
        zeros &= (1 << self.bits) - 1
        scales = tensors["scales"].t().float()
        grouping = self.in_order(part, tensors.get("g_idx"), "g_idx")
        return Codes(self.kind, codes, scales, grouping, zeros)


@dataclass(frozen=True)
class Awq(Grouped):
    """``qweight`` [K, N / 8] and ``qzeros`` [G, N / 8], both packed along N in AWQ's order, and
    ``scales`` [G, N]."""

    def tensors(self, part: Part) -> list[Stored]:
        (rows, columns), groups, each = part.shape, self.groups(part), self.each
        check_words(part, each, 0)
        packed, (cut, _) = part.words(0, each), self.cut(part)
        return [
            Stored("qweight", (columns, rows // each), (part.columns, packed), WORDS),
            Stored("qzeros", (groups, rows // each), (cut, packed), WORDS),
            Stored("scales", (groups, rows), (cut, part.rows)),
        ]

    def decode(self, part: Part, tensors: dict[str, Tensor]) -> Codes:
        codes, zeros = (self._unpack(tensors[leaf]).t() for leaf in ("qweight", "qzeros"))
        return Codes(self.kind, codes, tensors["scales"].t().float(), self.grouping(part), zeros)

    def _unpack(self, words: Tensor) -> Tensor:
        order = torch.tensor(AWQ_ORDER, device=words.device).argsort()
        codes = unpack(words, self.bits)
        return codes.view(len(codes), -1, self.each)[..., order].flatten(1)


@dataclass(frozen=True)
class PackQuantized(Grouped):
    """``weight_packed`` [N, ⌈K / 8⌉] packed along K, ``weight_scale`` [N, G], ``weight_zero_point``
    [⌈N / 8⌉, G] packed along N, if there are zeros, and ``weight_g_idx`` [K], if reordered."""

    def tensors(self, part: Part) -> list[Stored]:
        (rows, columns), groups, each = part.shape, self.groups(part), self.each
        packed, (cut, _) = (part.rows, part.words(1, each)), self.cut(part)
        tensors = [
            Stored("weight_packed", (rows, -(-columns // each)), packed, WORDS),
            Stored("weight_scale", (rows, groups), (part.rows, cut)),
        ]
        if self.has_zeros:
            zeros = (part.words(0, each), cut)
            tensors.append(Stored("weight_zero_point", (-(-rows // each), groups), zeros, WORDS))
        if self.reordered:
            tensors.append(Stored("weight_g_idx", (columns,), (part.columns,), INTEGERS))
        return tensors

    def decode(self, part: Part, tensors: dict[str, Tensor]) -> Codes:
        codes = unpack(tensors["weight_packed"], self.bits)
        codes = codes[:, : part.columns.stop - part.columns.start]
        zeros = None
        if self.has_zeros:
            zeros = unpack(tensors["weight_zero_point"].t(), self.bits).t()
            zeros = zeros[: part.rows.stop - part.rows.start]
        scales = tensors["weight_scale"].float()
        grouping = self.in_order(part, tensors.get("weight_g_idx"), "weight_g_idx")
        return Codes(self.kind, codes, scales, grouping, zeros)


@dataclass(frozen=True)
class PackedFloats:
    """Floats of 4 bits: ``weight_packed`` [N, K / 2] uint8, the lower half first, and scales of
    ``group`` inputs, ``weight_scale`` [N, G]: powers of two in E8M0 (MXFP4), or in E4M3 over
    ``weight_global_scale`` (NVFP4)."""

    group: int
    has_global: bool
    kind: Kind = Kind.E2M1
    has_zeros: bool = False
    height: int = 1
    rounding: Rounding | None = None

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.has_global else torch.bfloat16

    def grouping(self, part: Part) -> Grouping:
        return part.grouping(self.group)[1]

    def tensors(self, part: Part) -> list[Stored]:
        rows, columns = part.shape
        check_words(part, self.group, 1)
        packed, cut = (part.rows, part.words(1, 2)), (part.rows, part.grouping(self.group)[0])
        scales = (torch.float8_e4m3fn,) if self.has_global else (torch.uint8,)
        tensors = [
            Stored("weight_packed", (rows, columns // 2), packed, (torch.uint8,)),
            Stored("weight_scale", (rows, columns // self.group), cut, scales),
        ]
        if self.has_global:
            tensors.append(Stored("weight_global_scale", ()))
        return tensors

    def decode(self, part: Part, tensors: dict[str, Tensor]) -> Codes:
        codes = unpack(tensors["weight_packed"], 4)
        scales = tensors["weight_scale"]
        if self.has_global:
            scales = scales.float() / tensors["weight_global_scale"].float().reshape(())
        else:
            scales = e8m0(scales)
        return Codes(self.kind, codes, scales, self.grouping(part))


@dataclass(frozen=True)
class MxBlocks:
    """gpt-oss' MXFP4: ``blocks`` [N, K / 32, 16] uint8 of floats of 4 bits, the lower half first,
    and ``scales`` [N, K / 32], powers of two in E8M0."""

    kind: Kind = Kind.E2M1
    has_zeros: bool = False
    height: int = 1
    scale_dtype: torch.dtype = torch.bfloat16
    rounding: Rounding | None = None

    def grouping(self, part: Part) -> Grouping:
        return part.grouping(MX_GROUP)[1]

    def tensors(self, part: Part) -> list[Stored]:
        check_words(part, MX_GROUP, 1)
        cut = (part.rows, part.grouping(MX_GROUP)[0])
        shape = (part.shape[0], part.shape[1] // MX_GROUP)
        return [
            Stored("blocks", (*shape, MX_GROUP // 2), (*cut, slice(None)), (torch.uint8,)),
            Stored("scales", shape, cut, (torch.uint8,)),
        ]

    def decode(self, part: Part, tensors: dict[str, Tensor]) -> Codes:
        grouping, columns = self.grouping(part), part.columns.stop - part.columns.start
        codes = unpack(tensors["blocks"].flatten(1), 4)
        codes = codes[:, grouping.offset : grouping.offset + columns]
        return Codes(self.kind, codes, e8m0(tensors["scales"]), grouping)
