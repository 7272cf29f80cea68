"""The executor over several workers: it brings them up, hands them plans, and sees them die."""

import atexit
import contextlib
import hmac
import select
import socket
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.launch import Launcher
from engine import wire
from engine.addresses import address_family
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.executor import Capacity, ModelFacts
from engine.log import get_logger, waiting_for
from engine.plan import Ints, StepPlan, StepResult, ints
from engine.preempt import MeasuredCosts
from workers.channel import ChannelClosed, Receiver, RingReceiver, RingSender, SocketChannel
from workers.distributed import open_store
from workers.messages import Failure, Hello, Order, Report, Setup, Step, Units
from workers.rank import Call

log = get_logger("executor")

PLAN_RING_BYTES = 4 << 20
START_TIMEOUT = 180.0  # seconds in which every worker's process must have called
HELLO_BYTES = 1 << 12  # of a worker's first words: more is a stranger's
_PATIENCE = 1.0  # seconds that a worker has to end when told to
_LAST_PATIENCE = 10.0  # and when killed by a signal, sent from its own node
_PING_TIME = 0.5  # seconds that workers have to answer, before the time of a step is up
_GRACE = 0.2  # seconds in which the cause of a failure may follow its consequences
_reports: wire.Decoder[Report] = wire.Decoder(Report)
_results: wire.Decoder[StepResult] = wire.Decoder(StepResult)
_KINDS = {"ConfigError": ConfigError, "CheckpointError": CheckpointError}


@dataclass
class _Worker:
    """A worker as the executor sees it."""

    hello: Hello
    control: SocketChannel
    steps: SocketChannel | None = None  # where the ring does not reach
    answered: bool = True  # the last ping

    @property
    def complete(self) -> bool:
        """Whether there is a path for its plans."""
        return bool(self.hello.ring) or self.steps is not None


class Workers:
    """The processes of one replica, from ``start`` to ``stop``, and the paths to them.

    When one fails, all are ended at once, and whoever asks is told the cause.
    """

    def __init__(self, config: EngineConfig, launcher: Launcher) -> None:
        self._config = config
        self._launcher = launcher
        parallel = config.parallel
        self.size = parallel.world_size
        self._tensor = parallel.tensor_parallel_size
        self._workers: list[_Worker] = []
        self._lock = threading.RLock()
        self._stopped = False
        self._failure: str | None = None
        self._all_down = threading.Event()
        self._ring = RingSender(self.size, PLAN_RING_BYTES)
        self._results: Receiver | None = None
        self._store: Any = None

    # ---- starting ----

    def start(self, path: Path, is_folder: bool) -> None:
        """Start the processes and tell each its place; they load from then on."""
        launcher, parallel = self._launcher, self._config.parallel
        host = launcher.host
        self._store = open_store(host, parallel.rendezvous_port)
        token = uuid.uuid4().hex
        family = address_family(host)
        with (
            waiting_for(log, f"{self.size} workers to start"),
            socket.create_server((host, 0), family=family, backlog=2 * self.size) as listener,
        ):
            port = listener.getsockname()[1]
            launcher.start(Call(host, port, self._ring.path, token))
            self._workers = self._accept(listener, token)
        hosts = tuple(worker.hello.host for worker in self._workers)
        sharing = int(1 / parallel.worker_gpus + 1e-9)
        for worker in self._workers:
            neighbours = hosts.count(worker.hello.host)
            setup = Setup(
                config=self._config,
                path=str(path.resolve()),
                is_folder=is_folder,
                device=launcher.device,
                hosts=hosts,
                nccl=launcher.device == "cuda" and sharing == 1,
                store=(host, self._store.port),
                neighbours=neighbours,
                gpu_share=min(sharing, neighbours),
            )
            worker.control.send(wire.encode(Order(setup=setup)))

    def _accept(self, listener: socket.socket, token: str) -> list[_Worker]:
        """Wait for every rank's connections."""
        found: dict[int, _Worker] = {}
        listener.settimeout(0.1)
        deadline = time.monotonic() + START_TIMEOUT
        while len(found) < self.size or not all(worker.complete for worker in found.values()):
            try:
                channel = SocketChannel(listener.accept()[0])
                hello = _reports.decode(channel.receive(10.0, HELLO_BYTES) or b"").hello
            except TimeoutError:
                for rank, how in self._launcher.ended().items():
                    raise EngineError(f"{self._name(rank)} failed to start: {how}") from None
                if time.monotonic() > deadline:
                    missing = [self._name(i) for i in range(self.size) if i not in found]
                    raise EngineError(
                        f"{', '.join(missing)} did not start within {START_TIMEOUT:g} s"
                    ) from None
                continue
            except (ChannelClosed, ValueError):
                continue  # a stranger
            if hello is None or not hmac.compare_digest(hello.token.encode(), token.encode()):
                channel.close()
            elif hello.rank in found:
                found[hello.rank].steps = channel
            else:
                found[hello.rank] = _Worker(hello, channel)
        return [found[rank] for rank in range(self.size)]

    def ask(self, order: Order | None, answer: str, read: Callable[[int], None]) -> list[Report]:
        """Give every worker an order; each one's report that has ``answer``.

        ``read`` is told the bytes of weights that any worker reads meanwhile. Raises the worker's
        error, if one fails.
        """
        reports: dict[int, Report] = {}
        if order is not None:
            for worker in self._workers:
                worker.control.send(wire.encode(order))
        poll = select.poll()
        ranks = {worker.control.fileno(): rank for rank, worker in enumerate(self._workers)}
        for file in ranks:
            poll.register(file, select.POLLIN)
        while len(reports) < self.size:
            for file, _ in poll.poll(1000):
                rank = ranks[file]
                report = self._report(rank)
                while report is not None:
                    if report.failure is not None:
                        raise self._start_error(rank, report.failure)
                    read(report.read)
                    if getattr(report, answer) is not None:
                        reports[rank] = report
                    report = self._report(rank)
        return [reports[rank] for rank in range(self.size)]

    def _report(self, rank: int) -> Report | None:
        """What a worker says, if it says anything while starting."""
        try:
            data = self._workers[rank].control.receive(0)
        except ChannelClosed:
            time.sleep(_GRACE)
            how = self._launcher.ended(1.0).get(rank, "its connection broke")
            raise EngineError(f"{self._name(rank)} died while starting: {how}") from None
        return None if data is None else _reports.decode(data)

    def _start_error(self, rank: int, failure: Failure) -> Exception:
        name = self._name(rank)
        kind = _KINDS.get(failure.kind)
        if kind is not None:  # what a user did wrong needs no traceback
            return kind(f"{failure.message} ({name})")
        return EngineError(f"{name} failed to start:\n{failure.trace}")

    def _name(self, rank: int) -> str:
        stage, inner = divmod(rank, self._tensor)
        name = f"worker {rank} (stage {stage}, tensor rank {inner}"
        if rank < len(self._workers):
            hello = self._workers[rank].hello
            name += f", pid {hello.pid} on {hello.host}"
        return name + ")"

    # ---- running ----

    def watch(self) -> None:
        """From here on results come, from the first rank of the last stage, and deaths are seen."""
        worker = self._workers[self.size - self._tensor]
        self._results = RingReceiver(worker.hello.ring) if worker.hello.ring else worker.steps
        self._remote = [w.steps for w in self._workers if w.steps is not None]
        self._on_ring = any(w.steps is None for w in self._workers)
        threading.Thread(target=self._watch, name="manta-watch", daemon=True).start()

    def send(self, data: bytes) -> None:
        """One message to every worker. Raises EngineError if the replica is down."""
        self.check()
        try:
            if self._on_ring:
                self._ring.send(data)
            for steps in self._remote:
                steps.send(data)
        except ChannelClosed as error:
            self._lost(error)

    def receive(self, deadline: float) -> bytearray:
        """The next result. Raises EngineError if the replica fails, or at the deadline."""
        asked = False
        while True:
            results = self._results
            self.check()
            assert results is not None
            try:
                data = results.receive(min(0.2, max(0.0, deadline - time.monotonic())))
            except ChannelClosed as error:
                self._lost(error)
            if data is not None:
                return data
            if not asked and time.monotonic() >= deadline - _PING_TIME:
                asked = True
                self._ping()
            elif time.monotonic() >= deadline:
                self._fail_as_hung()

    def check(self) -> None:
        """Raise EngineError, naming the cause, if the replica failed."""
        if self._failure is not None:
            self._all_down.wait(30.0)
            raise EngineError(self._failure)

    def _lost(self, error: Exception) -> None:
        """A path broke: the watcher knows why, or will soon."""
        self._all_down.wait(5.0)
        if self._failure is None:
            self._fail(f"the path to a worker broke: {error}")
        self.check()

    def _watch(self) -> None:
        """Notice the first worker that dies or gives up, and end the others."""
        poll = select.poll()
        ranks = {}
        for rank, worker in enumerate(self._workers):
            ranks[worker.control.fileno()] = rank
            poll.register(worker.control.fileno(), select.POLLIN)
        died: list[int] = []
        gave_up: dict[int, Failure] = {}
        until = None
        while until is None or time.monotonic() < until:
            for file, _ in poll.poll(1000 if until is None else 20):
                rank = ranks.get(file, -1)
                try:
                    data = self._workers[rank].control.receive(0)
                    report = Report() if data is None else _reports.decode(data)
                except (ChannelClosed, ValueError):
                    poll.unregister(file)
                    died.append(rank)
                    report = Report()
                if report.pong:
                    self._workers[rank].answered = True
                if report.failure is not None:
                    gave_up[rank] = report.failure
            if self._stopped:
                return
            if (died or gave_up) and until is None:
                until = time.monotonic() + _GRACE
        first = [rank for rank in died if rank not in gave_up]
        if first:
            how = self._launcher.ended(1.0).get(first[0])
            self._fail(f"{self._name(first[0])} died" + (f": {how}" if how else ""))
        else:
            rank, failure = next(iter(gave_up.items()))
            self._fail(f"{self._name(rank)} failed:\n{failure.trace}")

    def _ping(self) -> None:
        for worker in self._workers:
            worker.answered = False
            with contextlib.suppress(ChannelClosed):
                worker.control.send(wire.encode(Order(ping=True)))

    def _fail_as_hung(self) -> None:
        """Name those that did not answer, if any, and give up."""
        hung = [i for i, worker in enumerate(self._workers) if not worker.answered]
        seconds = self._config.parallel.step_timeout
        who = f"; no answer from {', '.join(map(self._name, hung))}" if hung else ""
        self._fail(f"a step gave no result within step_timeout ({seconds:g} s){who}", hung)

    # ---- the end ----

    def _fail(self, cause: str, hung: Sequence[int] = ()) -> None:
        with self._lock:
            if self._stopped:
                return
            log.error("The replica failed: %s", cause)
            self._failure = cause
            self._launcher.kill(hung, hard=True)
            self._end(gently=False)

    def stop(self, gently: bool = True) -> None:
        """End every worker, ``gently`` if they run plans; later calls find nothing to do."""
        with self._lock:
            if self._stopped:
                return
            self._failure = "the replica was stopped"
            if not gently:
                self._end(gently)
                return
            try:
                for steps in (w.steps for w in self._workers if w.steps is not None):
                    steps.send(b"")
                self._ring.send(b"")
            except ChannelClosed:
                pass
            self._end(gently=True)

    def _await_ends(self, ranks: list[int], seconds: float) -> list[int]:
        """Which of the ranks still live after so long: a process that ends closes its socket."""
        deadline = time.monotonic() + seconds
        while True:
            left = [
                rank
                for rank in ranks
                if rank >= len(self._workers) or not self._workers[rank].control.ended
            ]
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(0.005)

    def _end(self, gently: bool) -> None:
        self._stopped = True
        self._ring.close()
        if self._results is not None:
            self._results.close()
            self._results = None
        self._store = None
        left = list(range(self.size))
        if gently:
            left = self._await_ends(left, _PATIENCE)
        self._launcher.kill(left, hard=False)
        left = self._await_ends(left, _PATIENCE if self._workers else 0.0)
        if left:
            self._launcher.kill(left, hard=True)
            self._await_ends(left, _LAST_PATIENCE if self._workers else 0.0)
        self._launcher.release()
        for worker in self._workers:
            worker.control.close()
            if worker.steps is not None:
                worker.steps.close()
        self._all_down.set()


@dataclass
class _Pending:
    """A step that was sent."""

    executor: "ParallelExecutor"
    plan: StepPlan
    sent: float

    def result(self) -> StepResult:
        return self.executor.take(self)


class ParallelExecutor:
    """Runs plans on ``tensor_parallel_size`` × ``pipeline_parallel_size`` workers."""

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        is_folder: bool,
        launcher: Launcher,
        progress: Callable[[int], None],
    ) -> None:
        self._config = config
        self._path = path
        self._is_folder = is_folder
        self._progress = progress
        self._launcher = launcher
        self._device = launcher.device
        self._units: Units | None = None  # what was reserved
        self._begin()

    def _begin(self) -> None:
        """With workers that are still to be started."""
        self._workers = Workers(self._config, self._launcher)
        self._finalizer = weakref.finalize(self, self._workers.stop)
        # finalize's own turn at the end of the program may come after Ray's, which ends the workers
        # as if they had failed; what is registered last comes first.
        atexit.register(self._finalizer)
        self._pending: deque[_Pending] = deque()
        self._learned: list[Ints] = []  # tokens that the first stage has not been told
        num_slots = self._config.scheduler.max_num_seqs
        self._admitted = np.full(num_slots, -1)  # step of a slot's admission
        self._last_result = 0.0

    @property
    def steps_ahead(self) -> int:
        """How many steps it pays to plan before a result: one for every further stage."""
        stages = self._config.parallel.pipeline_parallel_size
        return stages - 1 if stages > 1 else int(self._device == "cuda")

    @property
    def pipelined(self) -> bool:
        """Whether steps in flight must have no sequence in common: the first stage is told the
        tokens of a step only after its result."""
        return self._config.parallel.pipeline_parallel_size > 1

    def load(self) -> ModelFacts:
        """Start the workers and load. Raises what made a worker fail, or EngineError."""
        try:
            self._workers.start(self._path, self._is_folder)
            reports = self._workers.ask(None, "facts", self._progress)
        except BaseException:
            self._workers.stop(gently=False)
            raise
        facts = [report.facts for report in reports if report.facts is not None]
        return replace(
            facts[0],
            weight_bytes=sum(f.weight_bytes for f in facts),
            load_seconds=max(f.load_seconds for f in facts),
            device=self._device if len(facts) == 1 else f"{len(facts)} × {self._device}",
            batch_invariant=all(f.batch_invariant for f in facts),
        )

    def reserve(self) -> Capacity:
        """What every worker has room for: the least of what each has."""
        workers = self._workers
        try:
            units = self._units
            if units is None:
                reports = workers.ask(Order(measure=True), "units", self._progress)
                fits = [astuple(report.units) for report in reports if report.units is not None]
                units = Units(*map(min, zip(*fits, strict=True)))
            reports = workers.ask(Order(reserve=units), "capacity", self._progress)
        except BaseException:
            self._workers.stop(gently=False)
            raise
        capacities = [report.capacity for report in reports if report.capacity is not None]
        self._units = units
        workers.watch()
        costs = [capacity.costs for capacity in capacities]
        return Capacity(
            num_device_blocks=units.blocks,
            num_cpu_blocks=units.cpu_blocks,
            block_size=capacities[0].block_size,
            block_bytes=sum(capacity.block_bytes for capacity in capacities),
            attention_backend=capacities[0].attention_backend,
            kv_cache_dtype=capacities[0].kv_cache_dtype,
            costs=MeasuredCosts(
                max(c.seconds_per_block_out for c in costs),
                max(c.seconds_per_block_in for c in costs),
                max(c.seconds_per_prefill_token for c in costs),
            ),
            num_states=units.states,
            num_cpu_states=units.cpu_states,
            state_bytes=sum(capacity.state_bytes for capacity in capacities),
        )

    def run(self, plan: StepPlan) -> _Pending:
        learned = np.concatenate(self._learned) if self._learned else ints().reshape(0, 3)
        self._learned = []
        self._workers.send(wire.encode(Step(plan, learned)))
        for admit in plan.admits:
            self._admitted[admit.slot] = plan.step
        pending = _Pending(self, plan, time.monotonic())
        self._pending.append(pending)
        return pending

    def take(self, pending: _Pending) -> StepResult:
        """The result of the oldest step that was sent, which must be ``pending``."""
        assert self._pending[0] is pending, "results are taken in order"
        begun = max(pending.sent, self._last_result)
        data = self._workers.receive(begun + self._config.parallel.step_timeout)
        self._pending.popleft()
        self._last_result = time.monotonic()
        result = _results.decode(data)
        if self._config.parallel.pipeline_parallel_size > 1 and len(result.rows):
            plan, rows = pending.plan, result.rows
            slots, at = plan.slots[rows], (plan.starts + plan.counts)[rows]
            # A slot that was given away while the step ran is another sequence's now.
            same = self._admitted[slots] <= plan.step
            self._learned.append(np.stack((slots, at, result.tokens), 1)[same])
        return result

    def check(self) -> None:
        """Raise EngineError, naming the cause, if the workers can run nothing more."""
        self._workers.check()

    def restart(self) -> None:
        """Start other workers in the place of those that failed. Raises as ``load`` does."""
        self.stop()
        self._begin()
        self.load()
        self.reserve()

    def stop(self) -> None:
        self._finalizer()
        atexit.unregister(self._finalizer)
