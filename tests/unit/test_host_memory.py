"""The memory of the machine, and of control groups around the process."""

import os
from pathlib import Path

from workers.host_memory import host_memory

GIB = 2**30


def group(path: Path, limit: str, used: int, file: int = 0, shmem: int = 0) -> None:
    path.mkdir(exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\nfile {file}\nshmem {shmem}\n")


def test_the_machines_own() -> None:
    available, total = host_memory(cgroups=Path("/nowhere"))
    pages = {name: os.sysconf(f"SC_{name}_PAGES") for name in ("PHYS", "AVPHYS")}
    assert abs(total - pages["PHYS"] * os.sysconf("SC_PAGE_SIZE")) < 0.05 * total
    assert 0.8 * pages["AVPHYS"] * os.sysconf("SC_PAGE_SIZE") < available < total


def test_limits_of_groups(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    kib = GIB // 1024
    (proc / "meminfo").write_text(f"MemTotal: {16 * kib} kB\nMemAvailable: {12 * kib} kB\n")
    (proc / "self/cgroup").write_text("0::/pods/mine\n")
    root.mkdir()
    assert host_memory(proc, root) == (12 * GIB, 16 * GIB)  # no such controller
    group(root / "pods", "max", 5 * GIB)
    group(root / "pods/mine", "max", 5 * GIB)
    assert host_memory(proc, root) == (12 * GIB, 16 * GIB)
    group(root / "pods/mine", str(4 * GIB), 3 * GIB, file=2 * GIB, shmem=GIB)
    assert host_memory(proc, root) == (2 * GIB, 4 * GIB)
    group(root / "pods", str(3 * GIB), 3 * GIB, file=GIB)
    assert host_memory(proc, root) == (GIB, 3 * GIB)
    group(root / "pods", str(3 * GIB), 4 * GIB)
    assert host_memory(proc, root) == (0, 3 * GIB)
