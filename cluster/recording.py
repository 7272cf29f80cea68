"""Beginning a schedule log, and rebuilding from its header what a replay needs."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor import Capacity, Executor, ModelFacts
from engine.schedule_log import Header, RecordingExecutor

GIB = 2**30
_PIECES, _PIECE = 64, 4096  # how much of a file of weights is read for its digest


def recorded(
    executor: Executor, config: EngineConfig, path: Path, facts: ModelFacts, capacity: Capacity
) -> Executor:
    """``executor``, recorded if the option ``schedule_log`` asks for it. Raises ConfigError."""
    if config.log.schedule_log is None:
        return executor
    model = config.model.model
    if Path(model).expanduser().is_dir():  # so that it is found from another folder too
        model = str(path.resolve())
    header = Header(
        versions=versions(),
        config=dataclasses.replace(config, model=dataclasses.replace(config.model, model=model)),
        checkpoint=digest(path),
        facts=facts,
        capacity=capacity,
    )
    return RecordingExecutor(executor, Path(config.log.schedule_log), header)


def versions() -> dict[str, str]:
    """What the tokens of a run may depend on, beside the checkpoint."""
    found = {"python": platform.python_version()}
    for package in ("manta-serve", "torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def digest(path: Path) -> str:
    """Of the files of a checkpoint: names, sizes, configuration whole and weights by samples."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(path.iterdir()):
        if file.suffix not in {".json", ".safetensors", ".bin"}:
            continue
        size = file.stat().st_size
        found.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as content:
            if size <= 2 * _PIECES * _PIECE:
                found.update(content.read())
                continue
            for i in range(_PIECES):
                content.seek((size - _PIECE) * i // (_PIECES - 1))
                found.update(content.read(_PIECE))
    return found.hexdigest()


def replay_config(header: Header, overrides: dict[str, Any]) -> EngineConfig:
    """The options of the run in ``header`` with the same slots and blocks; ``overrides`` win."""
    options = {
        f.name: getattr(group, f.name)
        for group in (getattr(header.config, g.name) for g in dataclasses.fields(EngineConfig))
        for f in dataclasses.fields(group)
    }
    capacity = header.capacity
    # Twice the memory for CPU blocks, as another dtype may need it, and as much for states; only
    # what is used is touched.
    blocks, states = capacity.num_cpu_blocks, capacity.num_cpu_states
    sizes = (blocks + 0.5) * capacity.block_bytes, (states + 0.5) * capacity.state_bytes
    swap = 2 * (2 * max(sizes) if states else sizes[0]) / GIB
    same = {
        "block_size": capacity.block_size,
        "num_gpu_blocks_override": capacity.num_device_blocks,
        "num_mamba_states": capacity.num_states or None,
        "swap_space": swap if blocks else 0.0,
        "schedule_log": None,
    }
    return EngineConfig.from_options(**{**options, **same, **overrides})


def check_room(header: Header, capacity: Capacity) -> None:
    """Raises ConfigError if ``capacity`` does not hold what the logged plans use."""
    wanted = header.capacity
    names = "num_device_blocks", "num_cpu_blocks", "num_states", "num_cpu_states", "block_size"
    for name in names:
        there, needed = getattr(capacity, name), getattr(wanted, name)
        if there < needed or (name == "block_size" and there != needed):
            raise ConfigError(f"the log was made with {name} {needed}; here it is {there}")


def differences(header: Header, path: Path) -> list[str]:
    """What is not as it was when the log was made, in words."""
    found = []
    if digest(path) != header.checkpoint:
        found.append(f"the checkpoint {path} is not the one that was logged")
    now = versions()
    for name, version in header.versions.items():
        if now.get(name) != version:
            found.append(f"{name} was {version}, is {now.get(name, 'not there')}")
    return found
