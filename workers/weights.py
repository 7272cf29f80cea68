"""Filling a model's parameters from a checkpoint: each exactly once, each rank its own part."""

import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from workers.checkpoint import DTYPES
from workers.kernels.memory import trim
from workers.reading import Wanted, read
from workers.tensor_files import Entry, Index, TensorFile, find_files, open_file, whole

LOAD_FORMATS = ("auto", "safetensors", "pt", "dummy")
Cut = tuple[slice, ...]
Progress = Callable[[str, int], None]  # a tensor's name, and its bytes that this rank has read
DUMMY_VALUES = 1_000_003  # a prime, so that the rows of a matrix do not repeat
FLOATS = tuple(dict.fromkeys(DTYPES.values()))


class Target(Protocol):
    """What a parameter fills: a tensor, or a weight in codes (workers/quantization/codes.py)."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def copy_(self, part: Any, /) -> Any: ...


class Parameter:
    """The part of one checkpoint tensor that this rank holds, and where it goes.

    ``shape`` is the whole tensor's in the checkpoint, () for a single value of any shape; ``cut``
    is this rank's part of it, ``target`` the tensor (often a view of a merged one) that the part
    fills. ``filled`` is called once after, with what was filled: with ``adopt`` this may be the
    part as it was read, which must be copied or packed there and then, for there is room for few
    such parts. ``order`` are the rows of the part in the order in which the target holds them.
    ``dtypes`` are the types that the tensor may have; one that is ``optional`` may be missing.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        target: Target,
        cut: Cut = (),
        filled: Callable[[Any], None] = lambda tensor: None,
        adopt: bool = False,
        order: Tensor | None = None,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        optional: bool = False,
    ) -> None:
        self.name = name
        self.shape = shape
        self.cut = cut or (slice(None),) * len(shape)
        self.dtypes = dtypes
        self.optional = optional
        self._target: Target | None = target
        self._filled = filled
        self._adopt = adopt
        self._order = order

    @property
    def full(self) -> bool:
        return self._target is None

    @property
    def nbytes(self) -> int:
        """The bytes of what is to be filled; 0 once it is."""
        return 0 if self._target is None else self._target.nbytes

    @property
    def count(self) -> int:
        """How many numbers of the model it stands for."""
        return math.prod(self.shape)

    @property
    def target(self) -> Target:
        """What is to be filled; it is let go once that is done."""
        assert self._target is not None
        return self._target

    def absent(self) -> None:
        """Told of an optional one that the checkpoint lacks."""
        self._target = None

    def _let_go(self) -> Target:
        """The target, which is taken once: a packed weight is then freed at once."""
        if self._target is None:
            raise CheckpointError(f"the checkpoint holds tensor {self.name} more than once")
        target, self._target = self._target, None
        return target

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Where a part of this shape and type may be put as it is, before it is given to ``fill``;
        None if ``fill`` has more to do than that."""
        target = self.target
        if self._adopt or self._order is not None or not isinstance(target, Tensor):
            return None
        fits = (target.shape, target.dtype) == (shape, dtype) and target.is_contiguous()
        return target if fits else None

    def fill(self, part: Any) -> None:
        """Copy ``part``, converted to the target's type and device, unless it is in its place, and
        let the target go."""
        target = self._let_go()
        if self._order is not None:
            part = part[self._order]
        if self._adopt and part.dtype == target.dtype:
            target = part
        elif part is not target:
            target.copy_(part)
        self._filled(target)


@dataclass(frozen=True)
class Piece:
    """A parameter within a checkpoint tensor [``shape``] that holds several: ``at`` is its place, a
    number for each dimension that the parameter has not, a slice for each that it has; those are
    the other way round if it is ``transposed`` there."""

    name: str
    at: tuple[int | slice, ...]
    shape: tuple[int, ...]
    transposed: bool = False


class Loadable(Protocol):
    """What the loader asks of a model."""

    def parameters(self) -> Iterable[Parameter]:
        """Every parameter that this rank holds."""
        ...

    def network(self) -> Sequence[Parameter]:
        """The parameters of the whole model, on whichever rank and stage they live."""
        ...

    def parameter_name(self, name: str) -> str | None:
        """The parameter name of a checkpoint tensor; None for one known to mean nothing."""
        ...

    def parameter_pieces(self, name: str) -> list[Piece]:
        """The parameters that tensor ``name`` holds, if it is not one parameter itself."""
        ...

    @property
    def tied(self) -> dict[str, str]:
        """Names that only repeat another tensor: alias to owner."""
        ...


@dataclass(frozen=True)
class Loaded:
    """What loading took: bytes that this rank read, tensors, seconds; and how many numbers the
    whole model has."""

    bytes: int
    tensors: int
    seconds: float
    num_parameters: int


@dataclass(frozen=True)
class _Found:
    """Where a parameter is: the tensor ``raw`` of a file, or a piece of it."""

    raw: str
    file: TensorFile
    piece: Piece | None = None

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.raw]

    def misshapen(self, parameter: Parameter) -> str | None:
        """What is wrong with the tensor's shape, if something is."""
        expected = self.piece.shape if self.piece else parameter.shape
        shape = self.entry.shape
        if shape == expected or (expected == () and math.prod(shape) == 1):
            return None
        return f"{self.raw} {list(shape)}, not {list(expected)}"

    def mistyped(self, parameter: Parameter) -> str | None:
        """What is wrong with the tensor's type, if something is."""
        if self.entry.dtype in parameter.dtypes:
            return None
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in parameter.dtypes)
        return f"tensor {self.raw} is {self.entry.dtype}; allowed: {allowed}"

    def adds_nothing(self) -> bool:
        """Whether it is a bias of zeros, which GPTQ's tools write where the network has none."""
        return self.raw.endswith(".bias") and not any(x.any() for x in whole(self.file, self.raw))

    def repeats(self, other: "_Found") -> bool:
        """Whether both tensors are the same."""
        if (self.entry.shape, self.entry.dtype) != (other.entry.shape, other.entry.dtype):
            return False
        pairs = zip(whole(self.file, self.raw), whole(other.file, other.raw), strict=True)
        return all(torch.equal(ours, others) for ours, others in pairs)

    def wanted(self, parameter: Parameter) -> Wanted:
        """What is to be read for ``parameter``."""
        cut = parameter.cut
        at: Index = cut
        if self.piece is not None:
            cuts = iter(cut[::-1] if self.piece.transposed else cut)
            at = tuple(
                index if isinstance(index, int) else _within(index, next(cuts))
                for index in self.piece.at
            )
        at += (slice(None),) * (len(self.entry.shape) - len(at))  # a single value of any shape
        shape = self.entry.part(at)
        turned = self.piece is not None and self.piece.transposed
        place = None if turned else parameter.place(shape, self.entry.dtype)
        return Wanted(parameter.name, self.file, self.raw, at, place)


def _within(outer: slice, cut: slice) -> slice:
    """``cut`` of what ``outer`` selects."""
    start, step = outer.start or 0, outer.step or 1
    stop = outer.stop if cut.stop is None else start + step * (cut.stop - 1) + 1
    return slice(start + step * (cut.start or 0), stop, outer.step)


def load(
    model: Loadable, path: Path, load_format: str = "auto", progress: Progress | None = None
) -> Loaded:
    """Fill every parameter of ``model`` from the checkpoint folder ``path``.

    ``load_format`` is one of ``LOAD_FORMATS``; "dummy" reads no file and fills in small values
    that depend on the tensor's name alone, so that every layout of ranks holds the same model.
    Raises CheckpointError, naming up to five tensors, for missing, extra or misshapen ones.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format={load_format!r}: allowed are {', '.join(LOAD_FORMATS)}")
    start = time.perf_counter()
    with torch.inference_mode():
        network = model.network()
        if load_format == "dummy":
            read = _fill_dummy(model, progress)
        else:
            known = {parameter.name: parameter.optional for parameter in network}
            read = _fill_from_files(model, known, find_files(path, load_format), progress)
    trim()  # decoding took and gave back as much as the codes
    numbers = sum(parameter.count for parameter in network)
    return Loaded(sum(read), len(read), time.perf_counter() - start, numbers)


def _fill_from_files(
    model: Loadable, known: dict[str, bool], files: list[Path], progress: Progress | None
) -> list[int]:
    """Check every name and shape, then read. Returns the bytes read of each tensor.

    ``known`` are the names of the whole model, and whether each is optional.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_file(file)) for file in files]
        where = _locate(model, opened)
        extra = [found for name, found in where.items() if name not in known]
        _complain("the model does not know", [f.raw for f in extra if not f.adds_nothing()])
        lacks = [name for name, optional in known.items() if name not in where and not optional]
        _complain("the model needs but the checkpoint lacks", sorted(lacks))
        mine = {p.name: p for p in model.parameters()}
        wrong = (where[name].misshapen(p) for name, p in mine.items() if name in where)
        _complain("have the wrong shape", list(filter(None, wrong)))
        device = next((p.target.device for p in mine.values()), torch.device("cpu"))
        wanted: dict[TensorFile, deque[Wanted]] = {file: deque() for file in opened}
        for name, found in where.items():
            if name not in mine:
                continue
            if error := found.mistyped(mine[name]):
                raise CheckpointError(error)
            wanted[found.file].append(found.wanted(mine[name]))
        for name in mine.keys() - where.keys():
            mine[name].absent()
        sizes = []

        def take(one: Wanted, part: Tensor) -> None:
            piece = where[one.name].piece
            mine[one.name].fill(part.t() if piece and piece.transposed else part)
            sizes.append(one.nbytes)
            if progress:
                progress(one.name, one.nbytes)

        read(wanted.values(), device, take)
        return sizes


def _locate(model: Loadable, files: list[TensorFile]) -> dict[str, _Found]:
    """Where each parameter is."""
    where: dict[str, _Found] = {}
    for file in files:
        for raw in file.entries:
            name = model.parameter_name(raw)
            if name is None:
                continue
            pieces = {
                piece.name: _Found(raw, file, piece) for piece in model.parameter_pieces(name)
            }
            for part, found in (pieces or {name: _Found(raw, file)}).items():
                if part in where:
                    raise CheckpointError(f"the checkpoint holds tensor {part} more than once")
                where[part] = found
    for alias, owner in model.tied.items():
        if alias not in where:
            continue
        found = where.pop(alias)
        if owner not in where:
            where[owner] = found
            continue
        if not found.repeats(where[owner]):
            raise CheckpointError(
                f"tie_word_embeddings is true but tensor {found.raw} differs from"
                f" {where[owner].raw}"
            )
    return where


def _fill_dummy(model: Loadable, progress: Progress | None) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(DUMMY_VALUES).uniform_(-0.03, 0.03, generator=generator)
    read = []
    for parameter in model.parameters():
        if parameter.optional:
            parameter.absent()
            continue
        values = values.to(parameter.target.device)  # a card repeats them faster
        count = math.prod(parameter.shape)
        start = zlib.crc32(parameter.name.encode()) % DUMMY_VALUES
        repeats = -(-(start + count) // DUMMY_VALUES)
        full = values.repeat(repeats)[start : start + count].view(parameter.shape)
        if "norm" in parameter.name and parameter.name.endswith(".weight"):
            full = 1 + full
        part = full[parameter.cut]
        parameter.fill(part)
        read.append(part.numel() * part.element_size())
        if progress:
            progress(parameter.name, read[-1])
    return read


def _complain(what: str, names: list[str]) -> None:
    names = list(dict.fromkeys(names))  # a tensor of several pieces is named once
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(f"{len(names)} tensors {what}: {', '.join(names[:5])}{more}")
