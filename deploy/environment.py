"""``manta collect-env``: what a bug report needs."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from manta import __version__

PACKAGES = (
    "torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface-hub", "jinja2",
    "sentencepiece", "triton", "ray",
)  # fmt: skip
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CXX", "XDG_CACHE_HOME")
PREFIXES = ("HF_", "MANTA_", "RAY_", "NCCL_", "TOKENIZERS_")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def report() -> str:
    """Lines of ``name: value``; secrets in the environment are not shown."""
    lines = [
        ("manta", __version__),
        ("python", f"{sys.version.split()[0]} ({sys.executable})"),
        ("platform", platform.platform()),
        ("cpu", _cpu()),
        ("cpu flags", _cpu_flags()),
        ("memory", _memory()),
        ("compiler", _compiler()),
        *((name, _version(name)) for name in PACKAGES),
        *_torch(),
        *(
            (name, "(hidden)" if any(s in name for s in SECRET) else value)
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith(PREFIXES)
        ),
    ]
    return "\n".join(f"{name}: {value}" for name, value in lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> list[tuple[str, str]]:
    import torch

    lines = [
        ("torch threads", str(torch.get_num_threads())),
        ("torch cuda", str(torch.version.cuda)),
        ("cuda available", str(torch.cuda.is_available())),
    ]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append((f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"))
    return lines


def _cpuinfo(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    values = [line.split(":", 1)[1].strip() for line in text.splitlines() if field in line]
    return values[0] if values else ""


def _cpu() -> str:
    return f"{_cpuinfo('model name') or platform.processor()}, {os.cpu_count()} cores"


def _cpu_flags() -> str:
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return " ".join(flag for flag in wanted if flag in flags) or "none of " + " ".join(wanted)


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.1f} GiB"


def _compiler() -> str:
    name = os.environ.get("CXX") or "c++"
    if shutil.which(name) is None:
        return f"{name}: not found"
    run = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    return run.stdout.splitlines()[0] if run.stdout else name
