"""Values as callers of other programs give them: numbers, and what asks for nothing."""

import math
import numbers
from typing import Any


def whole(value: Any) -> int | None:
    """A whole number (5, 5.0, numpy's) as an int; None for anything else. A bool is no number."""
    if type(value) is int:
        return value
    if isinstance(value, numbers.Integral):
        return None if isinstance(value, bool) else int(value)
    number = real(value)
    return int(number) if number is not None and number.is_integer() else None


def real(value: Any) -> float | None:
    """A number (0.7, 1, numpy's) as a float, which may be infinite; None for anything else."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return None
        try:
            value = float(value)
        except OverflowError:
            value = math.inf if value > 0 else -math.inf
    return None if math.isnan(value) else value


def asks_for_nothing(value: Any, neutral: tuple[Any, ...] = ()) -> bool:
    """Whether a value for something that manta has not asks for nothing: None, what is empty, or
    one of ``neutral``."""
    if value is None or (isinstance(value, str | bytes | list | tuple | dict) and not value):
        return True
    if any(type(value) is type(one) and value == one for one in neutral):
        return True
    number = real(value)
    return number is not None and any(number == real(one) for one in neutral)
