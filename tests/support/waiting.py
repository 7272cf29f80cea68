"""Waiting for what another process does."""

import time
from collections.abc import Callable

# Seconds for whatever must come: a machine may be busy with something else. Only a test that
# fails waits so long.
PATIENCE = 300.0


def until(condition: Callable[[], object], timeout: float = PATIENCE) -> float:
    """Seconds until it holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout, "it never came"
        time.sleep(0.005)
    return time.monotonic() - start
