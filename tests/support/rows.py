"""Whether a row's result is its own."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def check_rows(product: Callable[[Tensor], Tensor], x: Tensor, counts: Iterable[int]) -> None:
    """No bit of the first rows depends on the others or on the number of threads."""
    whole, threads = product(x), torch.get_num_threads()
    try:
        for rows in counts:
            torch.set_num_threads(1 + rows % 3)
            assert torch.equal(product(x[:rows]), whole[:rows])
    finally:
        torch.set_num_threads(threads)
