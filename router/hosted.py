"""Tools that the provider of an API runs itself, which this server does not."""

import functools

from engine.log import get_logger
from router.errors import wrong

log = get_logger("router")


def pass_over(where: str, kind: str, strict: bool) -> None:
    """Leave out a tool of a ``kind`` that is not here, which the log says once.

    Raises ApiError if ``strict``, which is the server's option --strict-tools.
    """
    kind = kind[:100]
    if strict:
        what = f"{where}.type is {kind!r}: there are no tools here but the client's own"
        raise wrong(what, where, "unsupported_value")
    warn(kind)


@functools.lru_cache(maxsize=1024)
def warn(kind: str) -> None:
    """Agents send the same tools with every request: one line for each kind is enough."""
    log.warning("models are not shown tools of the type %r, which are not the client's own", kind)
