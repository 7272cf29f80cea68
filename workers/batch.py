"""The tensors of one step, as the model and the attention backend see them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step laid end to end: T tokens, R rows.

    Row r's queries are tokens ``query_starts[r] : query_starts[r + 1]``; they are the last ones
    of its ``context_lens[r]`` tokens. Position p of row r lives in block
    ``block_tables[r, p // block_size]`` at offset ``p % block_size``. Only ``outputs``
    go through the whole of the network's last layer.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    query_starts: Tensor  # [R + 1] int32
    context_lens: Tensor  # [R] int32, this step's tokens included
    block_tables: Tensor  # [R, max_blocks] int32
    cells: Tensor  # [T] int64: block * block_size + offset where a token's key and value go
    max_query_len: int
    max_context_len: int
    outputs: Tensor | None = None  # [n] int64: tokens; None: all
