"""Where engines and ingress replicas of an application are found, across the cluster, and which
models it has.

The entries are keys in Ray's own store (the GCS), which lives as long as the cluster: no process
of ours holds them, so none must be restarted. An entry says where something listens, not that it
lives: that is for its connection to show. What dies without taking its entry along leaves it to
the next one who finds nobody there (``remove``, ``unanswered``).
"""

import time
from typing import Literal
from urllib.parse import quote, unquote

from ray.experimental import internal_kv

Kind = Literal["engine", "ingress", "model"]  # a model's address is the number of its engines
_NAMESPACE = "manta"
FORGET_AFTER = 30.0  # seconds without an answer, after which an entry is dead


class Directory:
    """The entries of one application or named engine. Calls block for about a millisecond.

    Ray must be initialised.
    """

    def __init__(self, name: str) -> None:
        self._prefix = f"{name}/"
        self._silent_since: dict[str, float] = {}  # by address

    def add(self, kind: Kind, id: str, address: str) -> None:
        """Say where ``id`` listens."""
        internal_kv._internal_kv_put(self._key(kind, id, address), b"", namespace=_NAMESPACE)

    def remove(self, kind: Kind, id: str, address: str) -> None:
        """Forget an entry; harmless if it is gone."""
        internal_kv._internal_kv_del(self._key(kind, id, address), namespace=_NAMESPACE)

    def unanswered(self, kind: Kind, id: str, address: str) -> bool:
        """Nobody answered there; an entry of which that goes on for ``FORGET_AFTER`` seconds is
        forgotten. Whether it answered before."""
        first = address not in self._silent_since
        since = self._silent_since.setdefault(address, time.monotonic())
        if time.monotonic() - since > FORGET_AFTER:
            del self._silent_since[address]
            self.remove(kind, id, address)
        return first

    def silent(self, address: str) -> bool:
        """Whether nobody answered there the last time."""
        return address in self._silent_since

    def answered(self, address: str) -> None:
        """Somebody answered there."""
        self._silent_since.pop(address, None)

    def find(self, kind: Kind) -> dict[str, str]:
        """The addresses by id."""
        prefix = f"{self._prefix}{kind}/"
        keys = internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)
        entries = (key.decode()[len(prefix) :].split("/", 1) for key in keys)
        return {unquote(id): address for id, address in entries}

    def clear(self) -> None:
        """Forget all entries."""
        internal_kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=_NAMESPACE)

    def _key(self, kind: Kind, id: str, address: str) -> str:
        return f"{self._prefix}{kind}/{quote(id, safe='')}/{address}"
