"""An engine that others use: a replica, its loop and its server in one process; and such a
process as a named Ray actor that outlives whoever started it."""

import contextlib
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayTaskError,
)

from cluster.directory import Directory
from cluster.joining import connect_ray, own_host
from cluster.loop import EngineLoop
from cluster.ray_metrics import RayMetrics
from cluster.transport import Server
from engine.config import EngineConfig, ServedAs
from engine.errors import ConfigError, EngineError, MantaError, Unavailable
from engine.log import get_logger, waiting_for

log = get_logger("engine")

LAST_WORDS = 0.5  # seconds in which a failed engine tells its clients, before its process ends
STOP_SECONDS = 5.0  # in which it gives back what its workers hold
NAMESPACE = "manta"
_ASK_AGAIN = 0.1  # seconds


class EngineHost:
    """Builds a replica in this process and serves it until ``stop``.

    ``name`` is that of the application, in whose ``Directory`` it can be found. ``share`` is how
    many engines divide this machine's cores. ``served`` is what clients see of its model. An engine
    that fails takes its process along, once its clients know why: whoever started it starts
    another.
    """

    def __init__(
        self, config: EngineConfig, name: str, share: int = 1, served: ServedAs | None = None
    ) -> None:
        started = time.monotonic()
        take_cores(config, share)
        from cluster.replica import start_engine  # imports torch, which reads the environment

        self.engine_id = secrets.token_hex(4)
        engine, info = start_engine(config, self.engine_id)
        seconds = time.monotonic() - started
        info = dataclasses.replace(info, start_seconds=seconds, served=served or ServedAs())
        self._hang_after = info.step_timeout
        self._stopping = False
        self.loop = EngineLoop(engine, self._on_failure, self._on_leaving)
        server = Server(self.loop, info, secrets.token_hex(16), own_host())
        self.address = server.address
        self.loop.start()
        self._directory = Directory(name)
        self._directory.add("engine", self.engine_id, self.address)
        labels = {"model_name": info.names[0], "engine": self.engine_id}
        self._metrics = RayMetrics(self.loop.metrics, labels)
        self._metrics.start()

    def check_health(self) -> None:
        """Raises EngineError if the engine failed, or its step hangs.

        One that is well says again where it is: a client that could not reach it for a while may
        have taken its entry away.
        """
        if not self.loop.alive:
            raise EngineError(f"engine {self.engine_id} failed: {self.loop.failure}")
        seconds = self.loop.step_seconds
        if seconds > self._hang_after:
            raise EngineError(f"engine {self.engine_id}: a step hangs since {seconds:.0f} s")
        if not self._stopping:
            self._directory.add("engine", self.engine_id, self.address)

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no further request, give those in flight time to end, and stop.

        An engine whose step hangs has no time to be given: it is left to whoever ends its process.
        """
        self._stopping = True
        self._directory.remove("engine", self.engine_id, self.address)
        self._metrics.stop()
        hangs = self.loop.step_seconds > self._hang_after
        if drain_seconds > 0 and self.loop.alive and not hangs:
            self.loop.drain()
            if not self.loop.wait_idle(drain_seconds):
                log.warning("Requests are still in flight after %g s; they end now", drain_seconds)
            time.sleep(0.05)  # the last tokens leave
        self.loop.stop(STOP_SECONDS)

    def _on_failure(self, cause: str) -> None:
        threading.Timer(LAST_WORDS, self._die).start()

    def _on_leaving(self) -> None:
        log.info("Engine %s has handed over what it had, and ends", self.engine_id)
        threading.Timer(LAST_WORDS, self._die).start()

    def _die(self) -> None:
        self._directory.remove("engine", self.engine_id, self.address)
        self.loop.stop(STOP_SECONDS)  # its workers too
        os._exit(1)


def take_cores(config: EngineConfig, share: int) -> None:
    """Have an engine that computes in this process use this machine's cores, of which ``share``
    engines each have a part. Torch must not be loaded yet."""
    if config.parallel.world_size > 1:
        return
    cpus = config.parallel.worker_cpus or (os.cpu_count() or 1) // share
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(cpus)))  # Ray has set a thread for each CPU
    # Whoever serves shares these cores with the router: its threads are to let go of them while
    # Python runs between two kernels, sooner than workers/__init__.py has it.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def needed(config: EngineConfig) -> dict[str, float]:
    """The CPUs and GPUs that the process of an engine asks Ray for.

    That of a split model asks for none: its workers do. Ray must be initialised.
    """
    parallel = config.parallel
    if parallel.world_size > 1:
        return {"num_cpus": 0}
    device = config.device.device
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if device == "cuda" or (device == "auto" and resources.get("GPU")):
        return {"num_cpus": parallel.worker_cpus or 0, "num_gpus": parallel.worker_gpus}
    return {"num_cpus": 1 if parallel.worker_cpus is None else parallel.worker_cpus}


class _EngineActor:
    """The actor of a named engine. Where Ray starts it again, because its process or its node has
    gone, it serves again by itself; if it cannot, it is gone for good."""

    def __init__(
        self, options: Mapping[str, Any], name: str, share: int, served: ServedAs | None
    ) -> None:
        self._options, self._name, self._share, self._served = options, name, share, served
        self._started = threading.Event()
        self._host: EngineHost | None = None
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self.start()

    def ping(self) -> None:
        """Answers once it has been placed."""

    def start(self) -> None:
        """Load the model and serve it."""
        from cluster.replica import engine_config  # imports torch

        config = engine_config(**self._options)
        self._host = EngineHost(config, f"engine:{self._name}", self._share, self._served)
        self._started.set()

    def address(self) -> str:
        """Where it listens, once it does."""
        self._started.wait()
        assert self._host is not None
        return self._host.address

    def stop(self, drain_seconds: float) -> None:
        """Stop serving."""
        if self._host is not None:
            self._host.stop(drain_seconds)


def start_actor(name: str, options: Mapping[str, Any]) -> None:
    """Start a detached engine called ``name``; returns when it is ready.

    Raises ConfigError, CheckpointError or EngineError; then nothing of it stays.
    """
    config = EngineConfig.from_options(**options)
    connect_ray()
    if _actor(name) is not None:
        raise ConfigError(f"an engine called {name!r} runs already")
    place = {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
    _start(config, dict(options), name, 1, place)


@contextlib.contextmanager
def own_engines(
    name: str, options: Mapping[str, Any], count: int, served: ServedAs
) -> Iterator[str]:
    """``count`` engines on the cluster that live as long as the block, or this process. Gives the
    name of their ``Directory``. ``served`` is what clients see of their model.

    Raises ConfigError, CheckpointError or EngineError; then nothing of them stays.
    """
    config = EngineConfig.from_options(**options)
    connect_ray()
    actors = _start(config, dict(options), name, count, {}, served)
    try:
        yield f"engine:{name}"
    finally:
        _stop(actors, 0.0)
        Directory(f"engine:{name}").clear()


def _start(
    config: EngineConfig,
    options: dict[str, Any],
    name: str,
    count: int,
    place: dict[str, Any],
    served: ServedAs | None = None,
) -> list[Any]:
    """``count`` actors that serve; ``place`` are further options of theirs."""
    need = needed(config)
    actor_class: Any = ray.remote(_EngineActor).options(
        max_concurrency=16, max_restarts=-1, **need, **place
    )
    actors = [actor_class.remote(options, name, count, served) for _ in range(count)]
    engines = f"engine {name!r}" if count == 1 else f"{count} engines"
    try:
        _wait_for_room(actors, engines, config.parallel.placement_timeout, need)
        with waiting_for(log, f"{engines} to load the model"):
            ray.get([actor.start.remote() for actor in actors])
        return actors
    except BaseException as error:
        for actor in actors:
            _end(actor)
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, MantaError):
                raise error.cause from None
            raise EngineError(f"{engines} did not start: {error}") from error
        if isinstance(error, RayActorError):
            raise EngineError(f"{engines} died at the start: {error}") from error
        raise


def _wait_for_room(
    actors: list[Any], engines: str, timeout: float, need: Mapping[str, float]
) -> None:
    try:
        with waiting_for(log, f"room for {engines} in the cluster"):
            ray.get([actor.ping.remote() for actor in actors], timeout=timeout)
    except GetTimeoutError:
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        has = ", ".join(f"{free.get(k, 0):g} of {there.get(k, 0):g} {k}" for k in ("CPU", "GPU"))
        asked = ", ".join(f"{value:g} {key[4:].upper()[:-1]}" for key, value in need.items())
        each = "it needs" if len(actors) == 1 else "each needs"
        raise ConfigError(
            f"no room for {engines} within placement_timeout ({timeout:g} s): {each}"
            f" {asked}; of the cluster are free {has}"
        ) from None


def find_actor(name: str, timeout: float) -> str:
    """The address of the engine called ``name``. Raises EngineError if there is none, Unavailable
    if it is not ready in time."""
    connect_ray()
    actor = _actor(name)
    if actor is None:
        raise EngineError(f"there is no engine called {name!r}")
    deadline = time.monotonic() + timeout
    try:
        address = _address(actor, deadline)
    except GetTimeoutError:
        why = f"engine {name!r} is not ready within {timeout:g} s"
        raise Unavailable(why, "starting") from None
    except RayActorError as error:
        raise EngineError(f"engine {name!r} died: {error}") from error
    return address


def stop_actor(name: str, drain_seconds: float) -> None:
    """End the engine called ``name``. Raises EngineError if there is none."""
    connect_ray()
    actor = _actor(name)
    if actor is None:
        raise EngineError(f"there is no engine called {name!r}")
    _stop([actor], drain_seconds)


def _stop(actors: list[Any], drain_seconds: float) -> None:
    with contextlib.suppress(RayActorError, GetTimeoutError):
        stopping = [actor.stop.remote(drain_seconds) for actor in actors]
        ray.get(stopping, timeout=drain_seconds + 2 * STOP_SECONDS)
    for actor in actors:
        _end(actor)


def _address(actor: Any, deadline: float) -> str:
    """Where an engine listens. One that was killed is asked again when it is started again; with
    Ray's own retries, Ray would say in the user's terminal that a task failed."""
    while True:
        try:
            left = max(0.0, deadline - time.monotonic())
            address: str = ray.get(actor.address.remote(), timeout=left)
            return address
        except ActorUnavailableError:
            if time.monotonic() >= deadline:
                raise GetTimeoutError from None
            time.sleep(_ASK_AGAIN)


def _actor(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _end(actor: Any) -> None:
    """Kill an actor and wait until its name is free."""
    ray.kill(actor, no_restart=True)
    with contextlib.suppress(RayActorError, GetTimeoutError):
        ray.get(actor.ping.remote(), timeout=10)
