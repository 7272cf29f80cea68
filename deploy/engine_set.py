"""The engines of a running server: how many, of what shape, and which of them leave.

Engines are a Serve application of their own, ``manta-engines-N``. One of another shape or revision
is made beside the old one and takes its place once it serves: then the old engines drain, and
their requests move. What the engines are is kept in Ray's store, so that any program of the
cluster can change it.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.experimental import internal_kv
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster.client import EngineLoad
from cluster.directory import Directory
from cluster.joining import connect_ray
from cluster.transport import RemoteClient
from deploy.serve import APPLICATION, engine_application
from deploy.settings import SCALABLE, SIZES, Settings
from engine.errors import ConfigError, EngineError
from engine.log import get_logger, waiting_for

log = get_logger("serve")

_KEY, _NAMESPACE = f"{APPLICATION}/engine_set", "manta"
_LOOK_EVERY = 0.1  # seconds


@dataclasses.dataclass(frozen=True)
class EngineSet:
    """The engines that a server is to have. ``sizes`` are the options that say how many;
    ``generation`` counts shapes and revisions; ``options`` are those with which it began: with
    others Serve would replace it."""

    options: Mapping[str, Any]
    sizes: Mapping[str, int]
    generation: int = 0

    @classmethod
    def first(cls, settings: Settings) -> "EngineSet":
        """Those with which a server starts."""
        given = settings.options
        return cls(given, {name: given[name] for name in SIZES if given.get(name) is not None})

    @property
    def settings(self) -> Settings:
        """Those of today. Raises ConfigError."""
        others = {name: value for name, value in self.options.items() if name not in SIZES}
        return Settings.from_options({**others, **self.sizes})

    @property
    def application(self) -> str:
        return f"{APPLICATION}-engines-{self.generation}"

    def target(self) -> serve.RunTarget:
        """What Serve is to run."""
        engines = engine_application(self.settings, self.options, str(self.generation))
        return serve.RunTarget(engines, name=self.application, route_prefix=None)

    def save(self) -> None:
        """Have others find it."""
        value = json.dumps(dataclasses.asdict(self)).encode()
        internal_kv._internal_kv_put(_KEY, value, namespace=_NAMESPACE)

    @classmethod
    def found(cls) -> "EngineSet":
        """That of the server on this cluster. Raises EngineError if there is none."""
        value = internal_kv._internal_kv_get(_KEY, namespace=_NAMESPACE)
        if value is None:
            raise EngineError("no `manta serve` runs on this cluster")
        return cls(**json.loads(value))


def scale(timeout: float | None = None, **changes: Any) -> None:
    """Change the engines of the server on this cluster, without losing a request; returns when it
    is done. It joins the cluster of RAY_ADDRESS, or of this machine, if it is in none.

    changes: any of ``SCALABLE``. With another number alone, engines come or leave; with
        ``max_replicas`` it follows the load from then on, with ``num_replicas`` it does not. With
        another shape or revision new ones start first, for which there must be room beside the old
        ones. Requests go on at them if they serve the same model and revision, else they finish
        where they are. timeout: seconds for new engines to serve; ``startup_timeout`` by default.

    Raises ConfigError, naming what is wrong, and EngineError if the new engines do not start: then
    the old ones serve as before.
    """
    wrong = [name for name in changes if name not in SCALABLE]
    if wrong:
        raise ConfigError(f"{wrong[0]} cannot be changed by scale: {', '.join(SCALABLE)} can")
    connect_ray()
    now = EngineSet.found()
    asked = {name: value for name, value in changes.items() if value is not None}
    sizes = {name: asked.pop(name) for name in SIZES if name in asked}
    if sizes and "num_replicas" not in sizes:
        bounds = {name: value for name, value in now.sizes.items() if name != "num_replicas"}
        sizes = bounds | sizes
    new = dataclasses.replace(now, sizes=sizes or now.sizes)
    reshaped = any(now.options.get(name) != value for name, value in asked.items())
    if reshaped:
        new = EngineSet({**now.options, **asked}, new.sizes, now.generation + 1)
    settings = new.settings
    if timeout is None:
        timeout = settings.router.startup_timeout
    if reshaped:
        check_room(settings)
    serve.run_many([new.target()], wait_for_applications_running=False)
    try:
        _wait_until_it_runs(new, time.monotonic() + timeout)
    except BaseException:
        if reshaped:
            serve.delete(new.application)
        else:
            serve.run_many([now.target()], wait_for_applications_running=False)
        raise
    new.save()
    if reshaped:
        log.info("The new engines serve: the old ones drain")
        serve.delete(now.application)


def check_room(settings: Settings) -> None:
    """Raises ConfigError if the cluster has not free what the engines ask for: Serve would wait."""
    import ray

    from cluster.engine_actor import needed

    parallel, router = settings.engine.parallel, settings.router
    need = needed(settings.engine)
    if parallel.world_size > 1:  # its workers ask, not the engine; see RayLauncher
        alone = dataclasses.replace(parallel, tensor_parallel_size=1, pipeline_parallel_size=1)
        need = needed(dataclasses.replace(settings.engine, parallel=alone))
    replicas = router.replica_bounds[0]
    count = replicas * parallel.world_size
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    for key, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        if need.get(key, 0) * count > free.get(name, 0):
            raise ConfigError(
                f"{replicas} engines of {parallel.world_size} workers need"
                f" {need[key] * count:g} {name}; of the cluster's, {free.get(name, 0):g} are free"
                " (--worker-cpus and --worker-gpus say what a worker asks for)"
            )


def drain(engine_id: str, timeout: float = 60.0) -> None:
    """Have an engine hand over its requests and end; Serve starts another in its place. Returns
    when it has gone.

    Raises ConfigError if there is no such engine, EngineError if it is still there after
    ``timeout`` seconds, as one is that has nobody to hand over to.
    """
    there = engines()
    if engine_id not in there:
        names = ", ".join(there) or "none"
        raise ConfigError(f"there is no engine {engine_id!r}; there are: {names}")
    directory = Directory(APPLICATION)
    asyncio.run(_leave(directory.find("engine")[engine_id]))
    deadline = time.monotonic() + timeout
    while engine_id in directory.find("engine"):
        if time.monotonic() > deadline:
            raise EngineError(f"engine {engine_id} still has requests after {timeout:g} s")
        time.sleep(_LOOK_EVERY)


def engines() -> dict[str, EngineLoad]:
    """What each engine that answers has to do, by its id."""

    async def loads() -> dict[str, EngineLoad]:
        found = sorted(Directory(APPLICATION).find("engine").items())
        loads = await asyncio.gather(*(_load(address) for _, address in found))
        return {id: load for (id, _), load in zip(found, loads, strict=True) if load is not None}

    return asyncio.run(loads())


async def _load(address: str) -> EngineLoad | None:
    """None where nobody answers: an engine that died leaves its entry to whoever finds it so."""
    try:
        client = await RemoteClient.open(address, timeout=2.0)
    except EngineError:
        return None
    load = client.load
    await client.close()
    return load


async def _leave(address: str) -> None:
    client = await RemoteClient.open(address)
    client.leave()
    with contextlib.suppress(EngineError):
        await client.stats()  # what was said before has been heard then
    await client.close()


def _wait_until_it_runs(new: EngineSet, deadline: float) -> None:
    name, (least, most) = new.application, new.settings.router.replica_bounds
    with waiting_for(log, "the engines to be ready"):
        while not (found := running(name)) or not least <= _replicas(found[0]) <= most:
            if time.monotonic() > deadline:
                raise EngineError("the new engines were not ready in time")
            time.sleep(_LOOK_EVERY)


def running(*names: str) -> list[ApplicationStatusOverview]:
    """What Serve says of applications if all of them run; nothing if not. Raises EngineError, with
    the causes, if it gave up on one."""
    applications = serve.status().applications
    found = [applications[name] for name in names if name in applications]
    for one in found:
        if one.status == ApplicationStatus.DEPLOY_FAILED:
            causes = [d.message for d in one.deployments.values() if d.message]
            raise EngineError("\n".join(["the server did not start", *(causes or [one.message])]))
    statuses = [one.status for one in found]
    return found if statuses == [ApplicationStatus.RUNNING] * len(names) else []


def _replicas(engines: ApplicationStatusOverview) -> int:
    return sum(engines.deployments["Engine"].replica_states.values())
