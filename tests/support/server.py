"""The HTTP application on an engine in this process, under uvicorn, in a thread of its own."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from cluster.client import EngineClient
from cluster.loop import EngineLoop, LocalClient
from engine.config import EMBEDDED_MODEL
from engine.engine import Engine
from router.app import build_app
from router.config import RouterConfig
from router.service import Service
from tests.support.waiting import PATIENCE

ENGINE_OPTIONS: dict[str, Any] = {
    "kv_cache_memory_bytes": 64 << 20,
    "swap_space": 0.05,
    "use_tqdm_on_load": False,
}


class Server:
    """A server that runs. ``engines`` is the live set that the application looks at."""

    def __init__(self, model: str, options: dict[str, Any], config: RouterConfig) -> None:
        self.engines: list[EngineClient] = []
        self.loops: list[EngineLoop] = []
        self._model, self._options, self._config = model, options, config
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self.app: FastAPI
        self.port = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def service(self) -> Service:
        return self.app.state.service

    @property
    def engine(self) -> Engine:
        """The first engine itself. It belongs to its own thread: look, but do not touch."""
        return self.loops[0].engine

    def assert_idle(self) -> None:
        """Soon no request and no block is held."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            kv = self.engine.scheduler.kv
            held = kv.device.num_held + kv.cpu.num_held + self.engine.num_unfinished
            if not held and not self.service.stats.in_flight:
                return
            time.sleep(0.01)
        raise AssertionError(
            f"{held} blocks and requests are held, {self.service.stats.in_flight} here"
        )

    def start(self) -> None:
        self._thread.start()
        while not self.port:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start") from self._error
            time.sleep(0.01)

    def stop(self) -> None:
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._error = error
            raise

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        client = await LocalClient.start(self._model, **self._options)
        client.info = dataclasses.replace(client.info, served=self._config.served)
        self.engines.append(client)
        self.loops.append(client._loop)
        self.app = build_app(self._config, self.engines, "test")
        uvicorn_config = uvicorn.Config(
            self.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"
        )
        server = uvicorn.Server(uvicorn_config)
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        self.port = server.servers[0].sockets[0].getsockname()[1]
        await self._stop.wait()
        server.should_exit = True
        await task
        await client.close()


@contextmanager
def serving(
    router: dict[str, Any] | None = None, model: str = EMBEDDED_MODEL, **options: Any
) -> Iterator[Server]:
    """A server with these options of the router and of the engine."""
    config = RouterConfig.from_options(**(router or {}))
    server = Server(model, {**ENGINE_OPTIONS, **options}, config)
    server.start()
    try:
        yield server
    finally:
        server.stop()
