"""The log: lines for people on standard error, through the standard library's logging."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

WAITING = 10.0  # seconds between two lines about the same wait


def get_logger(name: str) -> logging.Logger:
    """The logger of one module, under ``manta``.

    Lines go to standard error unless the program has set up logging itself.
    """
    root = logging.getLogger("manta")
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%m-%d %H:%M:%S")
        )
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
    return root.getChild(name)


@contextlib.contextmanager
def waiting_for(log: logging.Logger, what: str) -> Iterator[None]:
    """While this lasts, say every ``WAITING`` seconds what is waited for."""
    started, over = time.monotonic(), threading.Event()

    def say() -> None:
        while not over.wait(WAITING):
            log.info("Waiting for %s: %.0f s so far", what, time.monotonic() - started)

    thread = threading.Thread(target=say, name="manta-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
