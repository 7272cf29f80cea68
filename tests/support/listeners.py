"""Which processes listen on which TCP ports, as the kernel says."""

import contextlib
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import title, tree

_LISTENS = "0A"  # the state in /proc/net/tcp


class Listener(NamedTuple):
    """A process's title, and where it listens."""

    process: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        inner = getattr(self.address, "ipv4_mapped", None)
        return (inner or self.address).is_loopback


def listeners(root: int) -> Iterator[Listener]:
    """The listeners of a process and of all that descend from it."""
    owners: dict[str, str] = {}
    for pid in tree(root):
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    owners[str(file.readlink())] = title(pid)
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            owner = owners.get(f"socket:[{fields[9]}]")
            if fields[3] == _LISTENS and owner is not None:
                address, _, port = fields[1].partition(":")
                yield Listener(owner, _address(address), int(port, 16))


def _address(words: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel writes words of 32 bits, each in this machine's order."""
    data = bytes.fromhex(words)
    data = b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))
    return ipaddress.ip_address(data)
