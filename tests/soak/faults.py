"""Faults, again and again: time to notice, what the caller saw, what was left behind.

python -m tests.soak.faults [--repeats 20] [--only NAME ...] [--backend mp]

Each repeat starts a replica of two workers on a local Ray cluster, or as plain processes, (two
tensor-parallel ranks and two pipeline stages in turn), does the harm, and looks for what is left.
``make soak-faults``.
"""

import workers  # noqa: F401, I001  # before torch

import argparse
import random
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from engine.errors import MantaError
from manta import LLM
from tests.parity.tiny_models import TINY_MODELS
from tests.support.faults import BASE, PHASES, Outcome, leftovers, strike, worker_pids
from tests.support.tiny_tokenizer import save_tokenizer

SHAPES = ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2})
Case = Callable[[int], Outcome]


class Faults:
    """The cases, by name; each takes the number of the repeat."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._backend = backend
        self._model = str(next(t for t in TINY_MODELS if t.name == "llama").save(folder))
        self._tokenizer = str(save_tokenizer(folder / "words", 128))
        self._damaged = folder / "damaged"
        self._damaged.mkdir()
        for file in Path(self._model).iterdir():
            (self._damaged / file.name).write_bytes(file.read_bytes())
        (self._damaged / "model.safetensors").write_bytes(b"x" * 100)
        if backend == "mp":
            return
        self._cluster = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        ray.init(address=self._cluster.address, log_to_driver=False)

    def close(self) -> None:
        if self._backend == "ray":
            ray.shutdown()
            self._cluster.shutdown()

    def cases(self) -> Iterator[tuple[str, Case]]:
        for phase in PHASES:
            for rank in (0, 1):
                yield f"kill -9, {phase}, rank {rank}", self._strike(phase, rank, signal.SIGKILL)
        for phase in ("prefill", "decode"):
            for rank in (0, 1):
                yield f"SIGSTOP, {phase}, rank {rank}", self._strike(phase, rank, signal.SIGSTOP)
        if self._backend == "ray":
            yield "a node is removed", self._node
            yield "an impossible shape", self._refused(tensor_parallel_size=4)
        yield "an occupied port", self._port
        yield (
            "an unreadable weight file",
            self._refused(model=str(self._damaged), tensor_parallel_size=2),
        )

    def _start(self, **options: Any) -> LLM:
        values = {"model": self._model, "tokenizer": self._tokenizer, **BASE, **options}
        return LLM(distributed_executor_backend=self._backend, **values)

    def _strike(self, phase: str, rank: int, number: signal.Signals) -> Case:
        def case(repeat: int) -> Outcome:
            llm = self._start(**SHAPES[repeat % 2])
            return strike(llm, rank, phase, number, random.random() * 0.02)

        return case

    def _refused(self, **options: Any) -> Case:
        def case(repeat: int) -> Outcome:
            begun = time.monotonic()
            try:
                self._start(**options)
            except MantaError as error:
                return Outcome(time.monotonic() - begun, str(error), leftovers([]))
            raise AssertionError("it started")

        return case

    def _port(self, repeat: int) -> Outcome:
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            return self._refused(tensor_parallel_size=2, rendezvous_port=port)(repeat)

    def _node(self, repeat: int) -> Outcome:
        node = self._cluster.add_node(num_cpus=4)
        llm = self._start(tensor_parallel_size=2, worker_cpus=1.5)
        pids = worker_pids(llm.engine)
        thread = threading.Thread(target=self._cluster.remove_node, args=(node,))
        thread.start()
        begun, error = None, ""
        while not error:
            if begun is None and not all(Path(f"/proc/{pid}").exists() for pid in pids):
                begun = time.monotonic()  # the node's end reached a worker
            try:
                llm.engine.check()
                time.sleep(0.001)
            except MantaError as caught:
                error = str(caught)
        told = time.monotonic()
        thread.join()
        return Outcome(told - (begun or told), error, leftovers(pids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="words, one of which a case's name has")
    parser.add_argument("--backend", choices=("ray", "mp"), default="ray")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), args.backend)
        print("| fault | times | told after, median (most) | what the caller saw | left behind |")
        print("| --- | --- | --- | --- | --- |")
        for name, case in faults.cases():
            if args.only and not any(word in name for word in args.only):
                continue
            outcomes = [case(repeat) for repeat in range(args.repeats)]
            seconds = [outcome.seconds for outcome in outcomes]
            left = sorted({item for outcome in outcomes for item in outcome.left})
            saw = outcomes[-1].error.splitlines()[0][:160]
            print(
                f"| {name} | {len(outcomes)} | {statistics.median(seconds):.2f} s"
                f" ({max(seconds):.2f}) | {saw} | {', '.join(left) or 'nothing'} |",
                flush=True,
            )
        faults.close()


if __name__ == "__main__":
    main()
