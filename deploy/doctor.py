"""``manta doctor``: what of this machine, its GPUs and its Ray cluster would stand in the way.

Each finding is a line that says what to do. A warning is something that costs speed or room, or
that only some servers need.
"""

import argparse
import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.addresses import address_family
from engine.errors import ConfigError, MantaError
from engine.folders import RunFolder, cache_folder

Level = Literal["ok", "warning", "problem"]
LEAST_FILES, GOOD_FILES = 1024, 65536
LEAST_SHM, GOOD_SHM = 64 << 20, 1 << 30  # shared memory of the workers on one host
LEAST_DISK, GOOD_DISK = 1 << 30, 10 << 30
GOOD_GPU = 0.9  # of a GPU's memory that is free
MOST_SKEW = 0.5  # seconds between the clocks of two nodes
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """What was found of one thing."""

    level: Level
    what: str
    says: str


Check = Callable[[], Iterator[Finding]]


def add_command(commands: Any) -> None:
    """Add ``doctor`` to the subparsers of ``manta``."""
    doctor = commands.add_parser(
        "doctor",
        help="say what of this machine or its Ray cluster would stand in the way",
        description="Look at this machine, its GPUs and the Ray cluster that RAY_ADDRESS names or"
        " that runs here. The exit status is 1 if there is a problem.",
    )
    doctor.add_argument("--host", default="0.0.0.0", help="address that a server is to listen on")
    doctor.add_argument("--port", type=int, default=8000, help="and its port (default: 8000)")
    doctor.set_defaults(run=_run, parser=doctor)


def _run(args: argparse.Namespace) -> int:
    if not 0 < args.port < 1 << 16:
        raise ConfigError(f"--port must be from 1 to 65535, got {args.port}")
    problems = 0
    marks = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}
    for check in (files, shared_memory, folders, lambda: ports(args.host, args.port), compiler,
                  clock, gpus, cluster):  # fmt: skip
        for finding in check():
            problems += finding.level == "problem"
            print(f"{marks[finding.level]}  {finding.what}: {finding.says}", flush=True)
    print("Nothing stands in the way." if not problems else f"{problems} to mend.")
    return min(problems, 1)


def _by_size(what: str, size: float, least: float, good: float, says: str, advice: str) -> Finding:
    if size >= good:
        return Finding("ok", what, says)
    return Finding("problem" if size < least else "warning", what, f"{says}: {advice}")


def files() -> Iterator[Finding]:
    """How many files a process may have open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = float("inf") if most == resource.RLIM_INFINITY else most
    yield _by_size(
        "open files", number, LEAST_FILES, GOOD_FILES, f"a process may have {number:g}",
        f"each connection takes two; raise the limit (ulimit -Hn {GOOD_FILES})",
    )  # fmt: skip


def shared_memory() -> Iterator[Finding]:
    """The room in /dev/shm."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        yield Finding(
            "problem", "/dev/shm", f"{error.strerror}: the workers of a host share memory there"
        )
        return
    yield _by_size(
        "/dev/shm", free, LEAST_SHM, GOOD_SHM, f"{free / GIB:.2f} GiB free",
        "several workers on a host want more (docker run --shm-size 4g; in Kubernetes an emptyDir"
        " of medium Memory)",
    )  # fmt: skip


def folders() -> Iterator[Finding]:
    """Whether there is a place for files of a run, and for what is kept; and room there."""
    try:
        run = RunFolder()
        run.remove()
        yield _disk("temporary files", Path(tempfile.gettempdir()))
    except (MantaError, OSError) as error:
        yield Finding("problem", "temporary files", str(error))
    try:
        yield _disk("cache", cache_folder("kernels"))
    except OSError as error:
        yield Finding(
            "warning", "cache", f"{error}: kernels are compiled at each start (XDG_CACHE_HOME)"
        )
    hub = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    while not hub.exists():
        hub = hub.parent
    yield _disk("models from the hub", hub)


def _disk(what: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    says = f"{free / GIB:.1f} GiB free in {folder}"
    return _by_size(what, free, LEAST_DISK, GOOD_DISK, says, "that is little")


def ports(host: str, port: int) -> Iterator[Finding]:
    """Whether a server could listen, and Ray keep to loopback."""
    for place, number, why in (
        (host, port, "--port names another"),
        ("127.0.0.1", 0, "Ray needs it: ip address add 127.0.0.1/8 dev lo"),
    ):  # fmt: skip
        what = f"port {number}" if number else "loopback"
        try:
            with socket.socket(address_family(place)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((place, number))
            yield Finding("ok", what, f"{place} can be listened on")
        except OSError as error:
            says = (
                "somebody listens there already"
                if error.errno == errno.EADDRINUSE
                else error.strerror
            )
            yield Finding("problem", what, f"{place}: {says}; {why}")


def compiler() -> Iterator[Finding]:
    """Whether CPU kernels can be compiled."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name and shutil.which(name):
        yield Finding("ok", "compiler", name)
    else:
        yield Finding(
            "warning", "compiler", "none: CPUs are several times slower (apt-get install g++)"
        )


def clock() -> Iterator[Finding]:
    """Whether the clock is set by somebody."""
    try:
        done = subprocess.run(
            ["timedatectl", "show", "-p", "NTPSynchronized", "--value"],
            capture_output=True, text=True, timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return  # a container: its host has the clock
    if done.stdout.strip() == "no":
        yield Finding(
            "warning",
            "clock",
            "nobody sets it (timedatectl set-ntp true): logs of several hosts would not fit",
        )
    elif done.returncode == 0:
        yield Finding("ok", "clock", "is kept right")


def gpus() -> Iterator[Finding]:
    """The NVIDIA GPUs, as the driver and as PyTorch have them."""
    import torch

    there = _driver()
    if not torch.cuda.is_available():
        if there and torch.version.cuda is None:
            yield Finding(
                "problem",
                "GPUs",
                f"{len(there)} are there, and PyTorch is a build for CPUs: pip install torch",
            )
        elif there:
            yield Finding(
                "problem",
                "GPUs",
                f"{len(there)} are there, and PyTorch cannot use them: does the driver fit CUDA"
                f" {torch.version.cuda}? Is CUDA_VISIBLE_DEVICES right?",
            )
        else:
            yield Finding("ok", "GPUs", "none: models run on the CPU")
        return
    count = torch.cuda.device_count()
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        says = f"{torch.cuda.get_device_name(i)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if free < GOOD_GPU * total:
            yield Finding(
                "warning",
                f"GPU {i}",
                f"{says}: somebody else has the rest (nvidia-smi), so give less to"
                " --gpu-memory-utilization",
            )
        else:
            yield Finding("ok", f"GPU {i}", says)
    if count > 1:
        yield from _links(count)


def _driver() -> list[str]:
    """The GPUs that the driver has; none without a driver."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.startswith("GPU")]


def _links(count: int) -> Iterator[Finding]:
    import torch

    apart = [
        f"{a} and {b}"
        for a in range(count)
        for b in range(a + 1, count)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if apart:
        yield Finding(
            "warning",
            "GPU links",
            f"GPUs {', '.join(apart[:4])} do not reach each other's memory: tensor parallelism goes"
            f" through the host's. NCCL {version}",
        )
    else:
        yield Finding("ok", "GPU links", f"every GPU reaches every other's memory; NCCL {version}")


def cluster() -> Iterator[Finding]:
    """The Ray cluster, if one is named or runs here: its nodes and what they have."""
    from cluster.joining import cluster_address, join_ray

    try:
        address = cluster_address()
        if address is None:
            yield Finding(
                "ok",
                "Ray",
                "no cluster is named (RAY_ADDRESS) or runs here: a server starts its own",
            )
            return
        join_ray(address, log_to_driver=False)
    except MantaError as error:
        yield Finding("problem", "Ray", str(error))
        return
    import ray

    try:
        yield from _nodes()
    finally:
        ray.shutdown()


def _nodes() -> Iterator[Finding]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = facts()
    look: Any = ray.remote(num_cpus=0)(facts)
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        what = f"node {node['NodeManagerAddress']}"
        if not node["Alive"]:
            yield Finding("warning", what, "is dead")
            continue
        there = {k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU")}
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked = time.time()
        try:
            told: dict[str, Any] = ray.get(
                look.options(scheduling_strategy=strategy).remote(), timeout=60
            )
        except Exception as error:  # Ray raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            yield Finding("problem", what, f"runs nothing of manta's: {reason}")
            continue
        wrong = [
            f"{name} is {told[name]}, here {own[name]}"
            for name in ("manta", "ray", "python")
            if told[name] != own[name]
        ]
        skew = max(asked - told["time"], told["time"] - time.time(), 0.0)
        if skew > MOST_SKEW:
            wrong.append(f"its clock is {skew:.1f} s away")
        if not told["haproxy"]:
            wrong.append(
                "RAY_SERVE_ENABLE_HA_PROXY is not set: `serve deploy` would put a Python proxy"
                " before every token"
            )
        says = ", ".join(f"{v:g} {k}" for k, v in sorted(there.items())) or "neither CPU nor GPU"
        if wrong:
            yield Finding("warning", what, f"{says}; {'; '.join(wrong)}")
        else:
            yield Finding("ok", what, says)


def facts() -> dict[str, Any]:
    """What a node says of itself."""
    import ray

    from manta import __version__

    return {
        "manta": __version__,
        "ray": ray.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        "time": time.time(),
        "haproxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1",
    }
