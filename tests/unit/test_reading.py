"""Parts of tensors read from files: what comes, how much of it at once, and what happens if not."""

import json
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError
from tests.support.file_parts import check_parts, save
from tests.support.waiting import until
from workers import tensor_files
from workers.reading import Wanted, read
from workers.tensor_files import TensorFile, open_file

CPU = torch.device("cpu")


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("chunk", [1 << 20, 64])
def test_a_part_is_what_torch_makes_of_the_tensor(
    suffix: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK", chunk)
    check_parts(tmp_path / f"model.{suffix}", torch.device("cpu"))


def test_a_file_is_read_from_its_beginning_to_its_end(
    opened: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: torch.rand(50, 4) for name in "cab"}
    path = save(tmp_path / "model.safetensors", tensors)
    file = opened.enter_context(open_file(path))
    offsets = []
    preadv = os.preadv

    def spy(handle: int, buffers: Any, offset: int) -> int:
        offsets.append(offset)
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    everything = (slice(None), slice(None))
    read([deque(Wanted(n, file, n, everything) for n in file.entries)], CPU, lambda *_: None)
    assert offsets == sorted(offsets) and len(offsets) == len(tensors)
    assert offsets[-1] + 50 * 4 * 4 == path.stat().st_size


class Files:
    """Files of as many equal tensors, whose reads are counted."""

    def __init__(self, count: int, each: int, folder: Path, opened: ExitStack) -> None:
        self.started = 0
        self.wanted: list[deque[Wanted]] = []
        for i in range(count):
            tensors = {f"{i}.{j}": torch.full((8,), 10 * i + j) for j in range(each)}
            file = opened.enter_context(open_file(save(folder / f"{i}.safetensors", tensors)))
            self.wanted.append(deque(Wanted(n, file, n, (slice(None),)) for n in tensors))
            self._count(file)

    def _count(self, file: TensorFile) -> None:
        inner, lock = file.read, threading.Lock()

        def counted(*arguments: Any) -> None:
            with lock:
                self.started += 1
            inner(*arguments)

        file.read = counted  # type: ignore[method-assign]


def test_no_more_than_two_of_the_largest_parts_are_on_their_way(
    opened: ExitStack, tmp_path: Path
) -> None:
    files, most, taken = Files(3, 6, tmp_path, opened), 0, 0

    def take(one: Wanted, part: Tensor) -> None:
        nonlocal most, taken
        if taken == 3:  # time for the threads to run ahead
            threading.Event().wait(0.2)
        most = max(most, files.started - taken)
        taken += 1

    read(files.wanted, CPU, take)
    assert taken == 18
    assert most == 2


def test_a_place_and_a_part_are_gone_when_nobody_else_has_them(
    opened: ExitStack, tmp_path: Path
) -> None:
    file = opened.enter_context(
        open_file(save(tmp_path / "a.safetensors", {n: torch.rand(3) for n in "abc"}))
    )
    places = [torch.empty(3), None, None]
    wanted = deque(
        Wanted(n, file, n, (slice(None),), place) for n, place in zip("abc", places, strict=True)
    )
    places.clear()
    seen: list[weakref.ref[Tensor]] = []

    def take(one: Wanted, part: Tensor) -> None:
        assert not [name for name in seen if name() is not None]
        seen.append(weakref.ref(part))

    read([wanted], CPU, take)
    assert len(seen) == 3


@pytest.mark.parametrize("where", ["taking", "reading"])
def test_what_fails_ends_all_threads(where: str, opened: ExitStack, tmp_path: Path) -> None:
    files = Files(3, 6, tmp_path, opened)
    before = threading.active_count()
    if where == "reading":
        os.truncate(tmp_path / "1.safetensors", (tmp_path / "1.safetensors").stat().st_size - 70)

    def take(one: Wanted, part: Tensor) -> None:
        if where == "taking" and one.name == "1.4":
            raise CheckpointError("it ends within tensor 1.4")

    with pytest.raises(CheckpointError, match=r"it ends within tensor 1\.4"):
        read(files.wanted, CPU, take)
    until(lambda: threading.active_count() == before)


def entry(dtype: str = "F32", shape: Any = (2,), start: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "or truncated: Expecting"),
    "no object": ([1], "its header is none of safetensors"),
    "no type": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "its header is none"),
    "no numbers": ({"a": entry(shape=["x"])}, "invalid literal for int"),
    "an unknown type": ({"a": entry("F4")}, "a is F4; allowed: F64, F32, F16, BF16, F8_E4M3"),
    "a gap": ({"a": entry(shape=[1], start=4)}, "a is not behind the tensor before it"),
    "an overlap": ({"a": entry(), "b": entry()}, "b is not behind the tensor before it"),
    "another size": ({"a": entry(shape=[3])}, "a is not behind the tensor before it"),
    "negative sizes": ({"a": entry(shape=[-1, -2])}, "a is not behind the tensor before it"),
    "too little": ({"a": entry(shape=[1], end=4)}, "bytes instead of"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    header, message = HEADERS[case]
    file = tmp_path / "model.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused = pytest.raises(CheckpointError, match=f"model.safetensors is damaged.*{message}")
    with refused, open_file(file):
        pass
