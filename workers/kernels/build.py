"""Compiles cpu.cpp and its headers once for this machine, into the user's cache, and loads them."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from engine.folders import cache_folders

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")

POINTER, I64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# fmt: off
SIGNATURES = {
    "attend": (
        POINTER, POINTER, POINTER, I64, POINTER, I64, POINTER, I64, POINTER, POINTER, INT, INT,
    ),
    "rope": (POINTER, I64, INT, POINTER, I64, INT, INT, I64, POINTER, POINTER, POINTER, INT, INT),
    "rms_norm": (POINTER, I64, I64, I64, I64, POINTER, FLOAT, POINTER, INT),
    "layer_norm": (POINTER, I64, I64, I64, POINTER, POINTER, FLOAT, POINTER, INT),
    "silu_mul": (POINTER, I64, I64, I64, POINTER, INT),
    "mask_rows": (POINTER, I64, I64, I64, POINTER, POINTER, I64, INT),
    "argmax_lse": (POINTER, I64, I64, I64, POINTER, POINTER, POINTER, INT),
}
# fmt: on
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Library:
    """The compiled kernels: ``functions[name, dtype]`` is a C function that releases the GIL."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.path = path
        self.functions = {}
        for name, arguments in SIGNATURES.items():
            for dtype, suffix in DTYPES.items():
                function = library[f"manta_{name}_{suffix}"]
                function.argtypes, function.restype = arguments, None
                self.functions[name, dtype] = function
        self.has_gemm = bool(library.manta_has_gemm())
        self.gemm_pack, self.gemm = library.manta_gemm_pack, library.manta_gemm
        self.gemm_pack.argtypes = (POINTER, I64, I64, POINTER, INT)
        self.gemm.argtypes = (
            POINTER, I64, I64, POINTER, I64, I64, POINTER, POINTER, I64, INT, POINTER, INT,
        )  # fmt: skip
        self.gemm_codes = library.manta_gemm_codes
        self.gemm_codes.argtypes = (
            POINTER, I64, I64, POINTER, POINTER, POINTER, POINTER, I64, I64, I64, I64, I64, POINTER,
            POINTER, I64, INT, POINTER, INT,
        )  # fmt: skip
        self.gemm_pack.restype = self.gemm.restype = self.gemm_codes.restype = None
        self.delta, self.mamba2 = library.manta_delta, library.manta_mamba2
        for recur in (self.delta, self.mamba2):
            recur.argtypes, recur.restype = (POINTER,) * 5 + (INT,), None
        self.group_reduce = {
            torch.float32: library.manta_group_reduce_fp32,
            torch.bfloat16: library.manta_group_reduce_bf16,
        }
        self.group_gather = library.manta_group_gather
        self.group_broadcast = library.manta_group_broadcast
        for reduce in self.group_reduce.values():
            reduce.argtypes, reduce.restype = (POINTER, POINTER, I64), None
        self.group_gather.argtypes = (POINTER, POINTER, I64, I64, POINTER)
        self.group_broadcast.argtypes = (POINTER, POINTER, I64)
        self.group_gather.restype = self.group_broadcast.restype = None
        library.manta_init.argtypes = (POINTER,)
        library.manta_init(_openmp())


@cache
def library() -> Library | None:
    """The kernels of this machine, compiled at the first call ever (seconds); None if they cannot
    be built, which is logged once with what to install."""
    try:
        return Library(build(cache_folders("kernels")))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning(
            "CPU kernels cannot be built, so slower PyTorch operations are used; install a C++17 "
            "compiler (Debian/Ubuntu: apt install g++) or name one in CXX. Reason: %s",
            str(reason).strip().split("\n")[0],
        )
        return None


def build(folders: Iterable[Path], target: str = NATIVE) -> Path:
    """The shared object for ``target`` (a -march or -mcpu flag), from the first of ``folders`` that
    has it, or else compiled now and kept in the first that can be written to.

    Its name is a hash of all that it depends on; it appears there at once and whole, so that
    processes may build at the same time. Raises OSError (no compiler, or no such folder) or
    CalledProcessError.
    """
    compiler = _compiler()
    version = _run(compiler, "--version")
    sources = [file.read_text() for file in (SOURCE, *HEADERS)]
    key = "\0".join([*sources, version, *FLAGS, target, _cpu()])
    name = f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    folders = list(folders)
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    work = _work_folder(folders)
    try:
        start = time.perf_counter()
        output = work / "cpu.so"
        _run(compiler, *FLAGS, target, str(SOURCE), "-o", str(output))
        path = output.replace(work.parent / name)
        logger.info("compiled the CPU kernels in %.1f s: %s", time.perf_counter() - start, path)
    finally:
        shutil.rmtree(work)
    return path


def _work_folder(folders: list[Path]) -> Path:
    """A new folder inside the first of these that can be written to."""
    cause: OSError = FileNotFoundError("no folder to keep them in")
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=folder))
        except OSError as error:
            cause = error
    raise cause


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"no C++ compiler found ({', '.join(names)})")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    first = lines[: lines.index("")] if "" in lines else lines
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in first if line.startswith(wanted))


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself runs on: a second runtime's
    threads would spin against torch's. None (one thread) where torch is built without one."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(torch_cpu)).GOMP_parallel
    except (OSError, AttributeError):
        logger.warning(
            "torch has no OpenMP runtime that can be shared: CPU kernels run on 1 thread"
        )
        return None
    return ctypes.cast(function, POINTER).value
