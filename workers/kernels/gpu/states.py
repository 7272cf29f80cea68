"""Where a program of a recurrence finds its part of a sequence's state."""

import triton
import triton.language as tl


@triton.jit
def part_of_state(
    state, stride, slot, head, ROWS: tl.constexpr, RP: tl.constexpr, COLUMNS: tl.constexpr,
    CS: tl.constexpr,
):  # fmt: skip
    """CS columns, by the first number of the program, of a head's matrix [ROWS, COLUMNS] in the
    state at ``slot`` int64: the numbers of rows [RP] and columns [CS], which of them there are, and
    pointers to the elements and their mask, both [RP, CS]."""
    row = tl.arange(0, RP)
    column = tl.program_id(0) * CS + tl.arange(0, CS)
    rows, columns = row < ROWS, column < COLUMNS
    at = state + slot * stride + head * (ROWS * COLUMNS) + row[:, None] * COLUMNS + column[None, :]
    return row, column, rows, columns, at, rows[:, None] & columns[None, :]
