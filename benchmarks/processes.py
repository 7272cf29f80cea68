"""A program's processes as the kernel sees them: CPU time, memory, open files."""

import os
from collections import defaultdict
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def _stat(path: Path) -> tuple[str, list[str]]:
    """A process's or thread's name, and the fields after it."""
    head, _, rest = path.read_text(encoding="utf-8", errors="replace").rpartition(")")
    return head.partition("(")[2], rest.split()


def tree(root: int) -> list[int]:
    """A process and all that descend from it and live, zombies left out."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, fields = _stat(stat)
        except OSError:
            continue  # it has ended
        if fields[0] != "Z":
            children[int(fields[1])].append(int(stat.parent.name))
    found, unseen = [], [root]
    while unseen:
        pid = unseen.pop()
        found.append(pid)
        unseen += children[pid]
    return found


def title(pid: int) -> str:
    """What a process is called: what Ray or vLLM call their workers, else the program."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    words = [word for word in words if word]
    if not words:
        return "ended"
    if words[0].startswith(("ray::", "VLLM::")):
        return words[0].split("#")[0].split(".")[0]
    names = [os.path.basename(word) for word in words if not word.startswith("-")]
    if names[0].startswith("python") and len(names) > 1:
        return names[1]
    return names[0]


def cpu_seconds(root: int) -> dict[str, float]:
    """CPU seconds so far, user and system, of a tree's processes by title."""
    found: dict[str, float] = defaultdict(float)
    for pid in tree(root):
        try:
            _, fields = _stat(Path(f"/proc/{pid}/stat"))
        except OSError:
            continue
        found[title(pid)] += (int(fields[11]) + int(fields[12])) / TICKS
    return found


def memory_bytes(pid: int) -> int:
    """Memory of a process's own (anonymous, resident)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def open_files(pid: int) -> int:
    """File descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_threads(pid: int) -> int:
    """Threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))
