"""The log: lines on standard error, for people or as JSON, by the standard library's logging."""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

WAITING = 10.0  # seconds between two lines about the same wait


# For the processes that others start: see ``set_format``.
FORMAT_VARIABLE = "MANTA_LOG_FORMAT"
FORMATS = ("text", "json")


class JsonLines(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, process, the ``fields``
    that the record has, and the traceback of an exception as ``error``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        seconds, milliseconds = divmod(int(record.created * 1000), 1000)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        line: dict[str, object] = {
            "time": f"{when}.{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **vars(record).get("fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """A line for people; the record's ``fields`` come after the message, as ``name=value``."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without the traceback of an exception."""
        fields = vars(record).get("fields", {})
        return " ".join([super().formatMessage(record), *(f"{k}={v}" for k, v in fields.items())])


def set_format(name: str) -> None:
    """Write the log of this process, and of those that it starts from now on, as one of
    ``FORMATS``."""
    os.environ[FORMAT_VARIABLE] = name
    for handler in logging.getLogger("manta").handlers:
        handler.setFormatter(_formatter())


def _formatter() -> logging.Formatter:
    return JsonLines() if os.environ.get(FORMAT_VARIABLE) == "json" else TextLines()


def get_logger(name: str) -> logging.Logger:
    """The logger of one module, under ``manta``.

    Lines go to standard error unless the program has set up logging itself.
    """
    root = logging.getLogger("manta")
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_formatter())
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
