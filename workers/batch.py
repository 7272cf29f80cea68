"""The tensors of one step, as the model and the attention backend see them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step laid end to end: T tokens, R rows; all are on the device, of integers.

    Row r's queries are tokens ``query_starts[r] : query_starts[r + 1]``; they are the last ones
    of its ``context_lens[r]`` tokens. Position p of row r lives in block
    ``block_tables[slots[r], p // block_size]`` at offset ``p % block_size``. Only ``outputs``
    go through the whole of the network's last layer. ``attention`` is what the backend's ``begin``
    made of the batch. Of a model with recurrent layers ``states[r]`` is where row r's state lives,
    and ``sweep`` what these layers share (``workers.sweep``).
    """

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    cells: Tensor  # [T]: block * block_size + offset where a token's key and value go
    slots: Tensor  # [R]
    query_starts: Tensor  # [R + 1] int32
    context_lens: Tensor  # [R] int32, this step's tokens included
    block_tables: Tensor  # [slots, max_blocks] int32
    max_context_len: int
    outputs: Tensor | None = None  # [n]: tokens; None: all
    attention: Any = None
    states: Tensor | None = None  # [R]
    sweep: Any = None
