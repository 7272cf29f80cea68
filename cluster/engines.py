"""Finding engines and keeping hold of them."""

import asyncio
from collections.abc import Collection, Iterator
from functools import partial

from cluster.client import EngineClient
from cluster.directory import Directory
from cluster.transport import RemoteClient
from engine.errors import EngineError
from engine.log import get_logger

log = get_logger("engines")

LOOK_EVERY = 1.0  # seconds between two looks into the directory
BRIEFLY = 0.1  # seconds to wait for an engine that did not answer before
LOOK_AT_FIRST = 0.03  # while no engine is known


class Engines(Collection[EngineClient]):
    """The engines of an application that can be reached now, kept current while it is open.

    An engine comes in when it is found in the directory and answers, and goes when its connection
    breaks. Belongs to one asyncio loop. ``models`` are the names of those that the application is
    to have, whether their engines live or not; none where nobody has said so.
    """

    def __init__(self, name: str) -> None:
        self.models: frozenset[str] = frozenset()
        self._directory = Directory(name)
        self._clients: dict[str, RemoteClient] = {}
        self._task: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None  # the look that began last
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[EngineClient]:
        return iter(list(self._clients.values()))

    def __contains__(self, client: object) -> bool:
        return client in self._clients.values()

    async def open(self) -> None:
        """Start keeping the set current."""
        self._closed = False
        if self._task is None:
            self._task = asyncio.create_task(self._keep_current())

    async def look(self) -> None:
        """Bring the set up to date now: what another process knew before, this one knows then.

        A look that began after the call serves all who wait for one; it goes on if they do not.
        """
        before = self._looking
        if before is not None:
            await asyncio.wait((before,))  # it began too early
        if self._closed:
            return
        if self._looking is before or self._looking is None:
            self._looking = asyncio.create_task(self._look())
        await asyncio.wait((self._looking,))

    def drain(self) -> None:
        """Have every engine admit nothing any longer; their ``load`` says when they are done."""
        for client in self._clients.values():
            client.drain()

    def end_requests(self, cause: str) -> None:
        """Have every engine end what it still has; its clients are told the cause."""
        for client in self._clients.values():
            client.end_requests(cause)

    async def close(self) -> None:
        """Close every connection; requests in flight end."""
        self._closed = True
        await _end(self._task, self._looking)
        await _end(*self._connecting.values())
        self._task = self._looking = None
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    async def _keep_current(self) -> None:
        while True:
            await self.look()
            known = self._clients or self._connecting
            await asyncio.sleep(LOOK_EVERY if known else LOOK_AT_FIRST)

    async def _look(self) -> None:
        try:
            models = await asyncio.to_thread(self._directory.find, "model")
            self.models = frozenset(models)
            await self._update(await asyncio.to_thread(self._directory.find, "engine"))
        except Exception as error:  # the GCS is away for a moment: go on with what is known
            log.warning("The directory cannot be read: %s", error)
            await asyncio.sleep(LOOK_EVERY)

    async def _update(self, found: dict[str, str]) -> None:
        for id, client in list(self._clients.items()):
            if not client.healthy:
                del self._clients[id]
                await client.close()
        for id, address in found.items():
            if id not in self._clients and id not in self._connecting:
                task = asyncio.create_task(self._connect(id, address))
                self._connecting[id] = task
                task.add_done_callback(partial(self._connected, id))
        # Who did not answer the last time is tried again, but keeps nobody waiting for long.
        silent = {id for id, address in found.items() if self._directory.silent(address)}
        tasks = list(self._connecting.items())
        if new := [task for id, task in tasks if id not in silent]:
            await asyncio.wait(new)
        if known := [task for id, task in tasks if id in silent]:
            await asyncio.wait(known, timeout=BRIEFLY)

    def _connected(self, id: str, task: asyncio.Task[None]) -> None:
        del self._connecting[id]

    async def _connect(self, id: str, address: str) -> None:
        try:
            self._clients[id] = await RemoteClient.open(address, timeout=2.0)
            self._directory.answered(address)
        except EngineError as error:
            if await asyncio.to_thread(self._directory.unanswered, "engine", id, address):
                log.warning("Engine %s: %s", id, error)
        except Exception as error:
            log.warning("Engine %s: %s: %s", id, type(error).__name__, error)


async def _end(*tasks: asyncio.Task[None] | None) -> None:
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    await asyncio.gather(*there, return_exceptions=True)
