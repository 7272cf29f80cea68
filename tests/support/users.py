"""Users with less than what the tests run as may have."""

import os
from pathlib import Path


def unprivileged() -> list[str]:
    """Words before a command that make root be refused what a file's mode refuses others."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


def nobody() -> list[str]:
    """Words before a command that run it as a user who is not among the system's, and has no home.

    To what is outside of this, it is still the user that runs the tests.
    """
    return ["env", "-u", "HOME", "-u", "XDG_CACHE_HOME", "unshare", "-U", "--map-user=54321"]


def poor(script: str = "") -> list[str]:
    """As ``nobody``, with 64 MB of shared memory and a checkout that cannot be written to.

    script: what else is to be done first by one who may change the mounts and networks there.
    """
    root = Path(__file__).resolve().parents[2]
    mounts = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    mounts += f" && mount --bind {root} {root} && mount -o remount,ro,bind {root}"
    first = " && ".join(filter(None, (mounts, script)))
    command = f'{first} && exec {" ".join(nobody())} "$@"'
    return ["unshare", "-Urmn" if script else "-Urm", "sh", "-c", command, "sh"]
