"""Faults, made on purpose: a replica on real workers, one of them killed, stopped or spoilt.

Used by the test suite (each once) and by ``tests/soak/faults.py`` (each many times).
"""

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.continuation import begin
from engine.engine import Engine
from engine.errors import EngineError
from engine.sampling_params import SamplingParams
from manta import LLM

PHASES = ("prefill", "decode", "idle")
BASE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 8 << 20,
    "swap_space": 0.001,
    "step_timeout": 3.0,
    "max_failovers": 0,  # a failure is to be seen
    "use_tqdm_on_load": False,
}


@dataclass
class Outcome:
    """What came of a fault."""

    seconds: float  # until the caller was told
    error: str  # what it was told
    left: list[str] = field(default_factory=list)  # what was left behind


def worker_pids(engine: Engine) -> list[int]:
    """The process of each rank."""
    return [w.hello.pid for w in engine.executor._workers._workers]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def leftovers(pids: list[int], patience: float = 1.0) -> list[str]:
    """Processes, actors, placement groups and shared memory that outlived a replica, as soon as
    there are none, or after ``patience`` seconds: a process that was killed takes a moment to go.
    """
    deadline = time.monotonic() + patience
    while (left := _leftovers(pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _leftovers(pids: list[int]) -> list[str]:
    left = [f"process {pid}" for pid in pids if _alive(pid)]
    left += [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if "manta" in name]
    maps = Path("/proc/self/maps").read_text()
    left += ["a mapped ring"] * min(1, maps.count("manta-ring"))
    import ray

    if ray.is_initialized():
        from ray._private.state import actors
        from ray.util import placement_group_table

        left += [f"actor {a['ActorID']}" for a in actors().values() if a["State"] != "DEAD"]
        groups = placement_group_table().values()
        left += [f"placement group {g['state']}" for g in groups if g["state"] != "REMOVED"]
    return left


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def add_requests(engine: Engine, count: int, prompt: int, output: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    for number in range(count):
        ids = [3 + (number + i) % 100 for i in range(prompt)]
        engine.add(
            begin(request_id=f"{time.time()}-{number}", prompt_token_ids=ids, sampling=sampling)
        )


def strike(llm: LLM, rank: int, phase: str, number: signal.Signals, delay: float) -> Outcome:
    """Send a signal to a rank in the middle of a phase; what the driver of the engine sees."""
    engine = llm.engine
    pids = worker_pids(engine)
    struck: list[float] = []

    def hit() -> None:
        struck.append(time.monotonic())
        os.kill(pids[rank], number)

    if phase == "prefill":
        add_requests(engine, 60, 180, 2)  # nearly all of the work is prefill
    elif phase == "decode":
        add_requests(engine, 8, 2, 200)
    for _ in range(12):
        engine.step()
    timer = threading.Timer(delay, hit)
    timer.start()
    error = ""
    while not error:
        try:
            if phase == "idle":
                engine.check()
                time.sleep(0.001)
            else:
                assert engine.has_work, "the work ended before the fault"
                engine.step()
        except EngineError as caught:
            error = str(caught)
    told = time.monotonic()
    timer.join()
    return Outcome(told - struck[0], error, leftovers(pids))
