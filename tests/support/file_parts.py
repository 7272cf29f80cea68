"""Parts of tensors in a file, read and held against what torch makes of the tensors."""

import itertools
from collections import deque
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from workers.reading import Wanted, read
from workers.tensor_files import Index, open_file

TYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
PARTS: list[tuple[tuple[int, ...], Index]] = [
    ((), ()),
    ((7,), (slice(None),)),
    ((7,), (slice(1, 6, 2),)),
    ((300, 20), (slice(100, 200), slice(None))),
    ((300, 20), (slice(None), slice(5, 10))),
    ((300, 20), (slice(0, 0), slice(None))),
    ((4, 30, 8), (2, slice(10, 20), slice(None))),
    ((4, 30, 8), (3, slice(1, 30, 2), slice(2, 6))),
    ((4, 30, 8), (1, slice(None), slice(0, 8, 2))),
    ((4, 30, 8), (1, 2, slice(None))),
    ((4, 30, 8), (1, 2, 3)),
    ((30, 1, 4), (slice(10, 20), 0, slice(None))),
]


def save(file: Path, tensors: dict[str, Tensor]) -> Path:
    save = save_file if file.suffix == ".safetensors" else torch.save
    save(tensors, file)
    return file


def check_parts(file: Path, device: torch.device) -> None:
    """Read every part from ``file``, which is made for it, with a place and without one."""
    tensors = {
        f"{list(shape)} {dtype}": torch.randint(-100, 100, shape).to(dtype)
        for (shape, _), dtype in itertools.product(PARTS, TYPES)
    }
    save(file, tensors)
    came = []

    def take(one: Wanted, part: Tensor) -> None:
        expected = tensors[one.tensor][one.at]
        assert part is one.place or one.place is None
        assert (part.dtype, part.device.type) == (expected.dtype, device.type)
        assert torch.equal(part.cpu(), expected), (one.tensor, one.at)
        came.append(one.name)

    with open_file(file) as opened:
        wanted: deque[Wanted] = deque()
        for (shape, at), dtype in itertools.product(PARTS, TYPES):
            name = f"{list(shape)} {dtype}"
            shape = tensors[name][at].shape
            for place in (None, torch.empty(shape, dtype=dtype, device=device)):
                wanted.append(Wanted(f"{len(wanted)}", opened, name, at, place))
        read([wanted], device, take)
    assert came == [str(i) for i in range(2 * len(PARTS) * len(TYPES))]
