"""The files of a checkpoint that hold tensors, and reading parts of them into memory that is given.

``pytorch_model.bin`` is read with ``torch.load(weights_only=True)`` and nothing looser. A file of
safetensors (its format: https://github.com/huggingface/safetensors#format) is read here rather than
mapped: a network's file system reads large pieces in order well and single pages badly, and what
cannot be read is then an error rather than the end of the process.
"""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import CheckpointError
from workers.checkpoint import read_json

CHUNK = 8 << 20  # bytes that are read at a time
MOST_HEADER_BYTES = 100_000_000  # as in safetensors' own readers
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}

Index = tuple[int | slice, ...]  # a number or slice for each dimension of a tensor


def bits(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as unsigned integers, whatever its type."""
    return tensor.view(_BITS[tensor.dtype.itemsize]).numpy()


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, which begins at byte ``start`` where that is known."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    def part(self, at: Index) -> tuple[int, ...]:
        """The shape of the part at ``at``."""
        sizes = zip(at, self.shape, strict=True)
        return tuple(len(range(*i.indices(n))) for i, n in sizes if isinstance(i, slice))

    def chunks(self, at: Index) -> Iterator[tuple[Index, Any]]:
        """The part at ``at`` in pieces for which about ``CHUNK`` bytes of the file are read: where
        each is in the tensor, and in the part."""
        dimension = next((i for i, index in enumerate(at) if isinstance(index, slice)), None)
        if dimension is None:
            yield at, ...
            return
        before, after = at[:dimension], at[dimension + 1 :]
        index = at[dimension]
        assert isinstance(index, slice)
        rows = range(*index.indices(self.shape[dimension]))
        row = math.prod(self.shape[dimension + 1 :]) * self.dtype.itemsize * rows.step
        count = max(1, CHUNK // max(1, row))
        for first in range(0, len(rows), count):
            some = rows[first : first + count]
            some_at = slice(some.start, some.stop, some.step)
            yield (*before, some_at, *after), slice(first, first + len(some))


class TensorFile(Protocol):
    """An open file; ``entries`` are its tensors, in the order in which they lie in it."""

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str, at: Index, out: NDArray[Any]) -> None:
        """Read the part ``at`` of a tensor into ``out``, its bits. For one thread at a time.
        Raises CheckpointError."""
        ...


class Safetensors:
    """A file of safetensors, open as ``handle``."""

    def __init__(self, file: Path, handle: int) -> None:
        self._file, self._handle = file, handle
        self._rows = np.empty(0, np.uint8)  # that a part is cut from
        self.entries = _read_header(file, handle)

    def read(self, name: str, at: Index, out: NDArray[Any]) -> None:
        entry = self.entries[name]
        shape, start = entry.shape, entry.start
        while at and isinstance(at[0], int):
            start += at[0] * math.prod(shape[1:]) * out.itemsize
            at, shape = at[1:], shape[1:]
        if not at or not out.size:
            self._fill(name, out, start)
            return
        assert isinstance(at[0], slice)
        rows = range(*at[0].indices(shape[0]))
        start += rows.start * math.prod(shape[1:]) * out.itemsize
        if out.shape == (len(rows), *shape[1:]) and rows.step == 1:
            self._fill(name, out, start)
            return
        whole = (rows[-1] + 1 - rows.start, *shape[1:])
        size = math.prod(whole) * out.itemsize
        if size > len(self._rows):
            self._rows = np.empty(size, np.uint8)
        read = self._rows[:size].view(out.dtype).reshape(whole)
        self._fill(name, read, start)
        np.copyto(out, read[(slice(None, None, rows.step), *at[1:])])

    def _fill(self, name: str, out: NDArray[Any], start: int) -> None:
        left = out.reshape(-1).view(np.uint8).data
        while left:
            try:
                count = os.preadv(self._handle, [left], start)
            except OSError as error:
                raise CheckpointError(f"cannot read {self._file}: {error.strerror}") from error
            if not count:
                raise CheckpointError(
                    f"{self._file} is damaged or truncated: it ends within tensor {name}"
                )
            left, start = left[count:], start + count


def _read_header(file: Path, handle: int) -> dict[str, Entry]:
    """The tensors in order. Raises CheckpointError if they are not, one after the other without
    gaps, the rest of the file."""
    size = os.fstat(handle).st_size
    try:
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(f"{size} bytes do not hold its header")
        header = json.loads(os.pread(handle, length, 8))
        header.pop("__metadata__", None)
        listed = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        entries, end = {}, 8 + length
        for name, fields in listed:
            if fields["dtype"] not in DTYPES:
                raise ValueError(f"{name} is {fields['dtype']}; allowed: {', '.join(DTYPES)}")
            dtype, shape = DTYPES[fields["dtype"]], tuple(map(int, fields["shape"]))
            entries[name] = Entry(dtype, shape, end)
            end += math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or fields["data_offsets"][1] != end - 8 - length:
                raise ValueError(f"{name} is not behind the tensor before it")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged or truncated: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: its header is none of safetensors") from error
    if end != size:
        raise CheckpointError(f"{file} is damaged or truncated: {size} bytes instead of {end}")
    return entries


class Pickled:
    """The tensors of a ``pytorch_model.bin``."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def read(self, name: str, at: Index, out: NDArray[Any]) -> None:
        np.copyto(out, bits(self._tensors[name])[at])


def _unpickle(file: Path) -> Pickled:
    try:
        # A file of the old tar format (torch before 1.6) cannot be mapped.
        tensors = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "empty"
        raise CheckpointError(f"{file} is damaged, truncated or unsafe: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{file} must hold a dict of tensors")
    return Pickled(tensors)


@contextmanager
def open_file(file: Path) -> Iterator[TensorFile]:
    """``file`` while it is used. Raises CheckpointError, which says why it cannot be."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    try:
        yield Safetensors(file, handle) if file.suffix == ".safetensors" else _unpickle(file)
    finally:
        os.close(handle)


def whole(file: TensorFile, name: str) -> Iterator[Tensor]:
    """A tensor of ``file``, in pieces of some megabytes. Raises CheckpointError."""
    entry = file.entries[name]
    for at, _ in entry.chunks((slice(None),) * len(entry.shape)):
        piece = torch.empty(entry.part(at), dtype=entry.dtype)
        file.read(name, at, bits(piece))
        yield piece


def find_files(path: Path, load_format: str = "auto") -> list[Path]:
    """The weight files of a checkpoint folder, as transformers finds them.

    Raises CheckpointError if there are none or if one that the index names is missing.
    """
    bases = {"safetensors": ["model.safetensors"], "pt": ["pytorch_model.bin"]}
    sought = bases.get(load_format, bases["safetensors"] + bases["pt"])
    for base in sought:
        if (path / base).is_file():
            return [path / base]
        index = path / f"{base}.index.json"
        if not index.is_file():
            continue
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        files = [path / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(f"{index} names files that are missing: {', '.join(absent[:5])}")
        return files
    raise CheckpointError(
        f"{path} has no weights: neither {' nor '.join(sought)}, nor an index of shards"
    )
