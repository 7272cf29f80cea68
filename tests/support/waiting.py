"""Waiting for what another process does."""

import time


def until(condition, timeout=60.0):
    """Seconds until it holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout
        time.sleep(0.005)
    return time.monotonic() - start
