"""Tools that the provider of an API runs itself, which this server does not."""

from engine.log import get_logger
from router.errors import wrong

log = get_logger("router")


def pass_over(where: str, kind: str, strict: bool) -> None:
    """Leave out a tool of a ``kind`` that is not here, with a line in the log.

    Raises ApiError if ``strict``, which is the server's option --strict-tools.
    """
    what = f"{where}: there are no tools of the type {kind[:100]!r} here, but the client's own"
    if strict:
        raise wrong(what, where, "unsupported_value")
    log.warning("%s; the model is not shown it", what)
