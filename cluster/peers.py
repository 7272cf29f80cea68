"""Ingress replicas of one application ask each other for what they have counted."""

import asyncio
import contextlib
import hmac
import secrets
from collections.abc import Callable, Mapping

import msgspec

from cluster.directory import Directory
from cluster.joining import own_host
from engine import wire
from engine.log import get_logger
from engine.stats import Metric

log = get_logger("peers")

PATIENCE = 2.0  # seconds for an answer; who gives none is left out
_KEY_BYTES = 32
_decoder: wire.Decoder[list[Metric]] = wire.Decoder(list[Metric])


class Peers:
    """This ingress replica as the others see it, and the others. Belongs to one asyncio loop.

    Whoever connects and gives the key is sent the metrics, and the connection ends.
    """

    def __init__(self, application: str, metrics: Callable[[], list[Metric]]) -> None:
        self._directory = Directory(application)
        self._id = ""
        self._metrics = metrics
        self._key = secrets.token_hex(_KEY_BYTES // 2)
        self._server: asyncio.Server | None = None
        self._address = ""

    async def open(self, id: str) -> None:
        """Listen, and say where, as ``id``."""
        self._id = id
        self._server = await asyncio.start_server(self._answer, own_host(), 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self._address = f"{host} {port} {self._key}"
        await asyncio.to_thread(self._directory.add, "ingress", self._id, self._address)

    async def others(self) -> Mapping[str, list[Metric]]:
        """The metrics of the other replicas, by their ids."""
        try:
            found = await asyncio.to_thread(self._directory.find, "ingress")
        except Exception as error:  # the GCS is away for a moment
            log.warning("The directory cannot be read: %s", error)
            return {}
        found.pop(self._id, None)
        answers = await asyncio.gather(*(self._ask(*entry) for entry in found.items()))
        return {
            id: metrics for id, metrics in zip(found, answers, strict=True) if metrics is not None
        }

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await asyncio.to_thread(self._directory.remove, "ingress", self._id, self._address)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(PATIENCE):
                key = await reader.readexactly(_KEY_BYTES)
                if hmac.compare_digest(key, self._key.encode()):
                    writer.write(wire.encode(self._metrics()))
                    await writer.drain()
        writer.close()

    async def _ask(self, id: str, address: str) -> list[Metric] | None:
        host, port, key = address.split()
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(key.encode())
                data = await reader.read(-1)
                writer.close()
            metrics = _decoder.decode(data)
        except ConnectionRefusedError:  # nobody is there any longer
            await asyncio.to_thread(self._directory.remove, "ingress", id, address)
            return None
        except (OSError, TimeoutError, msgspec.MsgspecError):
            await asyncio.to_thread(self._directory.unanswered, "ingress", id, address)
            return None
        self._directory.answered(address)
        return metrics
