"""One rank as a process: it calls the executor, takes its place, and runs the plans that come.

``serve`` is called by whatever started the process: a Ray actor, or ``python -m workers.rank``.
Two sockets lead to the executor. One is for control: orders and reports, and each side sees by it
at once that the other has died. Plans come by the ring in shared memory or by the other socket.
"""

import workers  # noqa: F401, I001  # before torch

import contextlib
import os
import queue
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import wire
from engine.errors import CheckpointError
from workers import products
from workers.channel import (
    ChannelClosed,
    Receiver,
    RingReceiver,
    RingSender,
    Sender,
    open_channel,
    rings_work,
)
from workers.checkpoint import resolve
from workers.distributed import Grid, join
from workers.messages import Failure, Hello, Order, Report, Setup, Step
from workers.worker import Pending, Worker

RESULT_RING_BYTES = 1 << 20
SPINS = 1000  # looks at the ring before a worker sleeps, each giving way to who wants the core
_order_decoder: wire.Decoder[Order] = wire.Decoder(Order)
_step_decoder: wire.Decoder[Step] = wire.Decoder(Step)


@dataclass(frozen=True)
class Call:
    """Whom a worker calls: the executor's address, its ring for readers on the same host, and the
    word by which it knows its workers."""

    host: str
    port: int
    ring: str
    token: str


class _Executor:
    """The executor as a rank sees it."""

    def __init__(self, rank: int, own_host: str, call: Call) -> None:
        self.plans: Receiver
        self.results: Sender
        self._ring: RingReceiver | None = None
        ring, path = None, ""
        if own_host == call.host and rings_work():
            try:
                ring = RingReceiver(call.ring, rank, SPINS)
                results = RingSender(1, RESULT_RING_BYTES)
                path = results.path
            except OSError:
                pass  # another container or user: a socket will do
        hello = Report(hello=Hello(call.token, rank, os.getpid(), own_host, path))
        self._control = open_channel(call.host, call.port)
        self.report(hello)
        if ring is not None:
            self.plans, self.results, self._ring = ring, results, ring
        else:
            self.plans = self.results = steps = open_channel(call.host, call.port)
            steps.send(wire.encode(hello))
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._over = False
        threading.Thread(target=self._listen, daemon=True).start()

    def sleep_at_once(self) -> None:
        """Where there is no plan: this process has another thread that needs its interpreter."""
        if self._ring is not None:
            self._ring.spin = 0

    def report(self, report: Report) -> None:
        self._control.send(wire.encode(report))

    def order(self) -> Order:
        return self._orders.get()

    def _listen(self) -> None:
        """Take orders, answer pings, and end this process when the executor is gone."""
        try:
            while True:
                order = _order_decoder.decode(self._control.receive() or b"")
                if order.ping:
                    self.report(Report(pong=True))
                else:
                    self._orders.put(order)
        except ChannelClosed:
            if not self._over:
                os._exit(1)

    def fail(self, error: BaseException) -> None:
        """This rank gives up."""
        trace = "".join(traceback.format_exception(error))
        with contextlib.suppress(ChannelClosed):
            self.report(Report(failure=Failure(type(error).__name__, str(error), trace)))

    def leave(self) -> None:
        """Told to stop: the executor may go."""
        self._over = True
        self._control.close()


def serve(rank: int, own_host: str, call: Call, cpus: float | None = None) -> None:
    """Be rank ``rank`` until the executor says stop or is gone.

    ``own_host`` is the address at which the others reach this machine; ``cpus`` are its threads
    if the user said so. A failure goes to the executor, with its traceback.
    """
    try:
        executor = _Executor(rank, own_host, call)
    except OSError as error:
        raise SystemExit(f"rank {rank}: cannot reach {call.host}:{call.port}: {error}") from error
    try:
        _run(executor, _take_place(executor, rank, cpus))
        executor.leave()
    except BaseException as error:
        executor.fail(error)
        raise SystemExit(1) from None  # the executor tells the user


def _take_place(executor: _Executor, rank: int, cpus: float | None) -> Worker:
    setup = executor.order().setup
    assert setup is not None
    _set_threads(setup, cpus)
    device, neighbours = torch.device("cpu"), setup.neighbours
    if setup.device == "cuda":
        products.set_up(setup.config.device.batch_invariance != "off")
        device, neighbours = torch.device("cuda", 0), setup.gpu_share
        executor.sleep_at_once()
        # Its monitor takes the end of a neighbour for a fault, and prints a trace of it.
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        torch.cuda.set_device(device)
    parallel = setup.config.parallel
    grid = Grid(
        parallel.tensor_parallel_size, parallel.pipeline_parallel_size, setup.hosts, setup.nccl
    )
    ranks = join(grid, rank, setup.store, device)
    worker = Worker(setup.config, _checkpoint(setup), device, ranks, neighbours)
    facts = worker.load(lambda name, count: executor.report(Report(read=count)))
    executor.report(Report(facts=facts))
    order = executor.order()
    if order.measure:
        executor.report(Report(units=worker.measure()))
        order = executor.order()
    assert order.reserve is not None
    executor.report(Report(capacity=worker.reserve(order.reserve)))
    return worker


def _set_threads(setup: Setup, cpus: float | None) -> None:
    if cpus is None:
        available = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        cpus = available // setup.neighbours
    torch.set_num_threads(max(1, int(cpus)))


def _checkpoint(setup: Setup) -> Path:
    path = Path(setup.path)
    if path.is_dir():
        return path
    if setup.is_folder:
        raise CheckpointError(f"{path} is not there on every machine that holds a worker")
    model = setup.config.model
    return resolve(model.model, model.revision, model.load_format)


def _run(executor: _Executor, worker: Worker) -> None:
    """Run plans until told to stop. On a GPU, where a step goes on by itself, results are waited
    for in a thread of their own, so that the next step is started meanwhile."""
    sender = _ResultSender(executor) if worker.device.type == "cuda" else None
    while data := executor.plans.receive():
        step = _step_decoder.decode(data)
        started = worker.run(step.plan, step.tokens)
        if worker.sampler is None:
            continue
        if sender is None:
            executor.results.send(wire.encode(started.result()))
        else:
            sender.send(started)
    if sender is not None:
        sender.finish()


class _ResultSender:
    """Sends the results of steps, in order, as they come."""

    def __init__(self, executor: _Executor) -> None:
        self._executor = executor
        self._steps: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="manta-results", daemon=True)
        self._thread.start()

    def send(self, step: Pending) -> None:
        """Raises what kept an earlier result from being sent."""
        if self._failure is not None:
            raise self._failure
        self._steps.put(step)

    def finish(self) -> None:
        """Send what is left."""
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (step := self._steps.get()) is not None:
                self._executor.results.send(wire.encode(step.result()))
        except BaseException as error:
            self._failure = error
            self._executor.fail(error)


def main() -> None:
    """``python -m workers.rank RANK OWN_HOST HOST PORT RING TOKEN [CPUS]``."""
    rank, own_host, host, port, ring, token, *cpus = sys.argv[1:]
    call = Call(host, int(port), ring, token)
    serve(int(rank), own_host, call, float(cpus[0]) if cpus else None)


if __name__ == "__main__":
    main()
