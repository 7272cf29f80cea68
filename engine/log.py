"""The log: lines for people on standard error, through the standard library's logging."""

import logging
import sys


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
