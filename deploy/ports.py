"""Ports for listeners that start later than they are chosen."""

import random
import socket

# Below the ports that systems give to connections by default: Ray's processes open hundreds of
# those before HAProxy listens. Serve's own are from 30000 on, `ray start`'s workers' up to 19999.
CHOICE = range(20000, 30000)


def free_ports(count: int, besides: int = 0) -> list[int]:
    """Different ports that nothing uses now, none of them ``besides``.

    Raises OSError if there are not so many.
    """
    found: list[int] = []
    for port in random.sample(CHOICE, len(CHOICE)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port != besides:
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports from {CHOICE.start} to {CHOICE.stop - 1}")
