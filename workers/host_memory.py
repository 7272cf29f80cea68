"""How much memory of the host this process may have: the machine's, or its container's."""

import contextlib
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def host_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> tuple[int, int]:
    """(available, total) bytes, within the limits of the control groups (v2) around this process.

    What the system keeps of files counts as available, for it gives that back.
    """
    machine = _fields(proc / "meminfo")
    available, total = (1024 * machine[name] for name in ("MemAvailable:", "MemTotal:"))
    group = cgroups
    with contextlib.suppress(OSError):  # a kernel without them
        for line in (proc / "self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                group = cgroups / line[3:].lstrip("/")
    while group.is_relative_to(cgroups):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such files; "max"
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            kept = _fields(group / "memory.stat")
            used -= kept["file"] - kept["shmem"]
            available, total = min(available, max(0, limit - used)), min(total, limit)
        group = group.parent
    return available, total


def _fields(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
