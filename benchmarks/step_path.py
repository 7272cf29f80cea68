"""What a step costs beside its computation: a plan to every worker, one result back.

python -m benchmarks.step_path [--steps 2000]

A decode plan of 32 rows is encoded, sent to 1, 2 or 4 worker processes, decoded by each, and
answered by one with 32 tokens, which are decoded. Ways: the ring in shared memory (one host), the
sockets (between hosts; here over the loopback), a Ray call to every worker, Ray's compiled graph.
"""

import argparse
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.dag import InputNode, MultiOutputNode

from engine import wire
from engine.plan import StepPlan, StepResult, ints
from workers.channel import RingReceiver, RingSender, SocketChannel, open_channel
from workers.messages import Step
from workers.rank import SPINS

ROWS = 32
STEPS: wire.Decoder[Step] = wire.Decoder(Step)
RESULTS: wire.Decoder[StepResult] = wire.Decoder(StepResult)


def make_step(number: int) -> Step:
    rows = np.arange(ROWS, dtype=np.int32)
    ones = np.ones(ROWS, np.int32)
    plan = StepPlan(number, rows, rows + number, ones, ones, ints([[3, 1, 7], [4, 1, 8]]))
    return Step(plan, ints().reshape(0, 3))


def answer(data: Any) -> bytes:
    plan = STEPS.decode(data).plan
    failed = np.zeros(ROWS, np.bool_)
    return wire.encode(StepResult(plan.step, ints(range(ROWS)), plan.starts, failed, {}, {}, 0.0))


def serve(kind: str, rank: int, where: str) -> None:
    """A worker: take plans until an empty one; rank 0 answers."""
    if kind == "ring":
        plans: Any = RingReceiver(where, rank, SPINS)
        results: Any = RingSender(1, 1 << 20)
        print(results.path, flush=True)
    else:
        plans = results = open_channel("127.0.0.1", int(where))
    while data := plans.receive():
        reply = answer(data)
        if rank == 0:
            results.send(reply)


def measure(step: Callable[[bytes], Any], steps: int) -> float:
    """Median microseconds of a step."""
    times = []
    for number in range(steps + 100):
        begun = time.perf_counter()
        data = step(wire.encode(make_step(number)))
        assert RESULTS.decode(data).step == number
        times.append(time.perf_counter() - begun)
    return statistics.median(times[100:]) * 1e6


def processes(kind: str, workers: int, where: str) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.step_path", "--serve", kind]
    return [
        subprocess.Popen([*command, str(rank), where], stdout=subprocess.PIPE, text=True)
        for rank in range(workers)
    ]


def over_ring(workers: int, steps: int) -> float:
    ring = RingSender(workers, 1 << 20)
    started = processes("ring", workers, ring.path)
    paths = [process.stdout.readline().strip() for process in started if process.stdout]
    results = RingReceiver(paths[0])

    def step(data: bytes) -> Any:
        ring.send(data)
        return results.receive()

    taken = measure(step, steps)
    ring.send(b"")
    for process in started:
        process.wait()
    return taken


def over_sockets(workers: int, steps: int) -> float:
    listener = socket.create_server(("127.0.0.1", 0))
    started, channels = [], []
    for rank in range(workers):
        command = [sys.executable, "-m", "benchmarks.step_path", "--serve", "socket"]
        port = str(listener.getsockname()[1])
        started.append(subprocess.Popen([*command, str(rank), port]))
        channels.append(SocketChannel(listener.accept()[0]))

    def step(data: bytes) -> Any:
        for channel in channels:
            channel.send(data)
        return channels[0].receive()

    taken = measure(step, steps)
    for channel in channels:
        channel.send(b"")
    for process in started:
        process.wait()
    return taken


class Actor:
    """A worker as a plain Ray actor."""

    def step(self, data: bytes) -> bytes:
        from benchmarks.step_path import answer  # this module has another name where it is run

        return answer(data)


def over_ray(workers: int, steps: int) -> tuple[float, float]:
    """(a call to every worker, a compiled graph over them)."""
    actors = [ray.remote(Actor).options(num_cpus=0).remote() for _ in range(workers)]
    called = measure(lambda data: ray.get([a.step.remote(data) for a in actors])[0], steps)
    with InputNode() as node:
        graph = MultiOutputNode([actor.step.bind(node) for actor in actors])
    compiled = graph.experimental_compile()
    taken = measure(lambda data: ray.get(compiled.execute(data))[0], steps)
    compiled.teardown()
    for actor in actors:
        ray.kill(actor)
    return called, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs=3)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], int(args.serve[1]), args.serve[2])
        return
    ray.init("local", include_dashboard=False, num_cpus=4)
    print("workers  ring  sockets  ray call  compiled graph  (µs per step, medians)")
    for workers in (1, 2, 4):
        rounds = []
        for _ in range(args.rounds):
            ring, sockets = over_ring(workers, args.steps), over_sockets(workers, args.steps)
            rounds.append((ring, sockets, *over_ray(workers, args.steps // 4)))
        figures = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(workers, *(f"{figure:8.0f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
