"""Starts HAProxy again at once where it has ended without being told to.

Serve notices that itself after three checks, which takes half a minute, and replaces the actor that
runs it. Serve's controller calls ``install`` when it starts, by
``RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH``.
"""

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray.serve._private import haproxy

log = logging.getLogger("ray.serve")

AGREED = 0.05  # seconds in which Serve says that it ended HAProxy itself
AGAIN = 0.5  # seconds until the next attempt, where HAProxy does not start
_Manager: Any = haproxy.HAProxyManager.__ray_metadata__.modified_class  # type: ignore[attr-defined]


class HAProxyManager(_Manager):  # type: ignore[misc]
    """Serve's actor that runs a node's HAProxy, and looks after it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._guard = self.event_loop.create_task(self._keep_running())

    async def _keep_running(self) -> None:
        with contextlib.suppress(Exception):  # Serve says so itself
            await asyncio.shield(self._haproxy_start_task)
        runs = self._haproxy
        while (process := runs._proc) is not None:
            await process.wait()
            await asyncio.sleep(AGREED)
            async with self._reload_lock:
                while runs._proc is process:  # neither replaced nor stopped
                    log.warning("HAProxy has ended (%s): it is started again", process.returncode)
                    try:
                        runs._proc = await runs._start_and_wait_for_haproxy()
                    except Exception as error:
                        log.error("HAProxy does not start: %s", error)
                        await asyncio.sleep(AGAIN)


def install() -> None:
    """Have the controller of this process use it."""
    from ray.serve._private import controller

    actor: Any = ray.remote(num_cpus=0)(HAProxyManager)
    controller.HAProxyManager = actor  # type: ignore[attr-defined]
