"""Bodies of requests as they come in, with a bound on their size, their time and their number."""

import asyncio
import time

from starlette.requests import Request

from router.errors import ApiError, client_closed, unavailable
from router.service import Service

BODY_SECONDS = 120.0  # for a whole body
LOOK_SECONDS = 1.0  # between two looks whether it is still worth waiting for
SMALL_BYTES = 1 << 14  # of a body that is always let in
MOST_BYTES = 1 << 28  # of all bodies together that are larger and not complete
_CLOSE = {"connection": "close"}  # the rest of the body is not read


async def receive_body(request: Request, service: Service) -> bytes:
    """The whole body of a request.

    Raises ApiError: 413 if it is larger than ``--max-body-bytes``, 408 if it takes longer than
    ``BODY_SECONDS``, 499 if the client goes, 503 if a drain begins before it is complete, or if
    other large bodies have taken the memory that there is for them.
    """
    most = service.config.max_body_bytes
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    deadline = time.monotonic() + BODY_SECONDS
    data, counted = bytearray(), 0
    try:
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    more = True
                    while more:
                        more = await _receive(request, data)
                        if len(data) > most:
                            raise _too_large(most)
                        if more and len(data) > SMALL_BYTES:
                            service.body_bytes += len(data) - counted
                            counted = len(data)
                            if service.body_bytes > MOST_BYTES:
                                raise unavailable("too many large bodies come in", "overloaded")
                    return bytes(data)
            except TimeoutError:
                await service.check_drain()
                if time.monotonic() > deadline:
                    raise ApiError(
                        408,
                        f"the body took longer than {BODY_SECONDS:g} s",
                        code="request_timeout",
                        headers=_CLOSE,
                    ) from None
    finally:
        service.body_bytes -= counted


async def _receive(request: Request, data: bytearray) -> bool:
    """Append the next part of a body; whether there is more."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise client_closed()  # which nobody reads
    data += message.get("body", b"")
    return bool(message.get("more_body", False))


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {most} bytes (--max-body-bytes)",
        code="request_too_large",
        headers=_CLOSE,
    )
