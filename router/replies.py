"""Answers on their way to a client, who may go at any moment: then the engine stops at once."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.access import remember
from router.answers import Answer, WholeAnswer
from router.error_shapes import error_response
from router.errors import api_error, client_closed
from router.guard import client_of

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies shall not hold it back
]


class Reply(Response):
    """Runs an answer and sends it, whole or as a stream of events.

    It watches for the client's disconnect all the while; if it comes, what the engine does for the
    request is cancelled, whatever state it is in. ``own_id``: X-Request-Id is the answer's id, not
    what the request had there.
    """

    def __init__(self, answer: WholeAnswer, own_id: bool) -> None:
        super().__init__(None)
        self._answer = answer
        self._id = dict.fromkeys(answer.id_headers, answer.id) if own_id else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stats = self._answer.service.stats
        stats.in_flight += 1
        try:
            await self._reply(scope, receive, send)
        finally:
            stats.in_flight -= 1

    async def _reply(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._run(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))  # so that nothing of it is left
        if work.cancelled():
            await error_response(client_closed(), scope)(scope, receive, send)
        else:
            work.result()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        stream = answer if isinstance(answer, Answer) and answer.streaming else None
        started = False
        try:
            async with answer.service.generations(
                answer.model,
                answer.prompts,
                answer.sampling,
                answer.priority,
                stream is not None,
                client_of(scope, by_key=bool(answer.service.config.api_key)),
                answer.pools,
            ) as generations:
                remember(scope, generations)
                if stream is not None:
                    own = [(name.encode(), value.encode()) for name, value in self._id.items()]
                    headers = [*STREAM_HEADERS, *own]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    started = True
                    async for data in stream.events(generations):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                else:
                    body = await answer.complete(generations)
        except Exception as error:
            failure = api_error(error, answer.service.retry_after(error))
            if stream is None or not started:
                await error_response(failure, scope)(scope, receive, send)
                return
            data = stream.failed(failure)
            await send({"type": "http.response.body", "body": data, "more_body": True})
        if started:
            await send({"type": "http.response.body", "body": b""})
        else:
            response = Response(body, 200, self._id, "application/json")
            await response(scope, receive, send)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
