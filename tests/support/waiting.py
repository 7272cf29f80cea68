"""Waiting for what another process does."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], timeout: float = 60.0) -> float:
    """Seconds until it holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout
        time.sleep(0.005)
    return time.monotonic() - start
