"""The engines of a running server: of which models, how many, of what shape, and which of them
leave.

The engines of a model are a Serve application of their own, ``manta-engines-N``. One of another
shape or revision is made beside the old one and takes its place once it serves: then the old
engines drain, and their requests move. What the engines are is kept in Ray's store, so that any
program of the cluster can change it.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.experimental import internal_kv
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster.client import EngineLoad
from cluster.directory import Directory
from cluster.joining import connect_ray
from cluster.transport import RemoteClient
from deploy.serve import APPLICATION, engine_application
from deploy.settings import SCALABLE, SIZES, STOP_BUFFER, Settings, without_secrets
from engine.errors import ConfigError, EngineError
from engine.log import get_logger, waiting_for

log = get_logger("serve")

_SETS, _NUMBERS = f"{APPLICATION}/engine_set/", f"{APPLICATION}/engine_number/"
_NAMESPACE = "manta"
_LOOK_EVERY = 0.1  # seconds
_SERVES_OWN = 30.0  # seconds that Serve itself may take to end an application


@dataclasses.dataclass(frozen=True)
class EngineSet:
    """The engines that a model of a server is to have. ``sizes`` are the options that say how many;
    ``number`` tells it from all others, of other models and of other shapes and revisions of this
    one; ``beside`` is how many engines other models had when it began. ``options`` are those with
    which it began: with others Serve would replace it."""

    options: Mapping[str, Any]
    sizes: Mapping[str, int]
    number: int = 0
    beside: int = 0

    @classmethod
    def of(cls, settings: Settings, number: int, beside: int) -> "EngineSet":
        """That of a model which is new."""
        given = without_secrets(settings.options)
        sizes = {name: given[name] for name in SIZES if given.get(name) is not None}
        return cls(given, sizes, number, beside)

    @classmethod
    def first(cls, models: Sequence[Settings]) -> "list[EngineSet]":
        """Those with which a server starts. What a server before it has left is taken away."""
        most = sum(settings.router.replica_bounds[1] for settings in models)
        sets = []
        for number, settings in enumerate(models):
            _claim(number)
            sets.append(cls.of(settings, number, most - settings.router.replica_bounds[1]))
        for left in cls.all():
            left.forget()
            if left.number >= len(models):
                serve.delete(left.application)
        return sets

    @property
    def settings(self) -> Settings:
        """Those of today. Raises ConfigError."""
        others = {name: value for name, value in self.options.items() if name not in SIZES}
        return Settings.from_options({**others, **self.sizes})

    @property
    def names(self) -> tuple[str, ...]:
        """Those of its model; the first is the model's id."""
        return self.settings.names

    @property
    def application(self) -> str:
        return f"{APPLICATION}-engines-{self.number}"

    def target(self) -> serve.RunTarget:
        """What Serve is to run."""
        version = str(self.number)
        engines = engine_application(self.settings, self.options, version, self.beside)
        return serve.RunTarget(engines, name=self.application, route_prefix=None)

    def save(self) -> None:
        """Have others find it, and have clients find its model."""
        value = json.dumps(dataclasses.asdict(self)).encode()
        internal_kv._internal_kv_put(f"{_SETS}{self.number}", value, namespace=_NAMESPACE)
        for name in self.names:
            Directory(APPLICATION).add("model", name, str(self.number))

    def forget(self) -> None:
        """Have nobody find it any longer."""
        internal_kv._internal_kv_del(f"{_SETS}{self.number}", namespace=_NAMESPACE)
        for name in self.names:
            Directory(APPLICATION).remove("model", name, str(self.number))

    def end(self) -> None:
        """Have its engines drain; returns when they have gone."""
        patience = self.settings.router.shutdown_timeout + STOP_BUFFER + _SERVES_OWN
        deadline = time.monotonic() + patience
        serve.delete(self.application, _blocking=False)
        while self.application in serve.status().applications:
            if time.monotonic() > deadline:
                raise EngineError(f"{self.application} has not ended after {patience:g} s")
            time.sleep(_LOOK_EVERY)

    @classmethod
    def all(cls) -> "list[EngineSet]":
        """Those of the server on this cluster."""
        keys = internal_kv._internal_kv_list(_SETS, namespace=_NAMESPACE)
        values = [internal_kv._internal_kv_get(key, namespace=_NAMESPACE) for key in keys]
        found = [cls(**json.loads(value)) for value in values if value is not None]
        return sorted(found, key=lambda engines: engines.number)


def found_sets() -> list[EngineSet]:
    """Those of the server on this cluster, at least one. Raises EngineError if there is none."""
    found = EngineSet.all()
    if not found:
        raise EngineError("no `manta serve` runs on this cluster")
    return found


def set_of(model: str | None) -> EngineSet:
    """That of a model of the server on this cluster, by any of its names; None stands for the only
    one.

    Raises ConfigError if there is no such model, or if None could be any of several, and
    EngineError if there is no server.
    """
    sets = found_sets()
    there = ", ".join(engines.names[0] for engines in sets)
    if model is None and len(sets) > 1:
        raise ConfigError(f"model is missing: the server has {there}")
    for engines in sets:
        if model is None or model in engines.names:
            return engines
    raise ConfigError(f"the server has no model {model!r}; it has {there}")


def scale(timeout: float | None = None, model: str | None = None, **changes: Any) -> None:
    """Change the engines of the server on this cluster, without losing a request; returns when it
    is done. It joins the cluster of RAY_ADDRESS, or of this machine, if it is in none.

    changes: any of ``SCALABLE``. With another number alone, engines come or leave; with
        ``max_replicas`` it follows the load from then on, with ``num_replicas`` it does not. With
        another shape or revision new ones start first, for which there must be room beside the old
        ones. Requests go on at them if they serve the same model and revision, else they finish
        where they are. timeout: seconds for new engines to serve; ``startup_timeout`` by default.
        model: whose engines, where the server has several.

    Raises ConfigError, naming what is wrong, and EngineError if the new engines do not start: then
    the old ones serve as before.
    """
    wrong = [name for name in changes if name not in SCALABLE]
    if wrong:
        raise ConfigError(f"{wrong[0]} cannot be changed by scale: {', '.join(SCALABLE)} can")
    connect_ray()
    now = set_of(model)
    asked = {name: value for name, value in changes.items() if value is not None}
    sizes = {name: asked.pop(name) for name in SIZES if name in asked}
    if sizes and "num_replicas" not in sizes:
        bounds = {name: value for name, value in now.sizes.items() if name != "num_replicas"}
        sizes = bounds | sizes
    new = dataclasses.replace(now, sizes=sizes or now.sizes)
    if any(now.options.get(name) != value for name, value in asked.items()):
        options = {**now.options, **asked}
        introduce(dataclasses.replace(new, options=options, number=new_number()), now, timeout)
        return
    try:
        _run(new, timeout)
    except BaseException:
        serve.run_many([now.target()], wait_for_applications_running=False)
        raise
    new.save()


def introduce(new: EngineSet, old: EngineSet | None, timeout: float | None = None) -> None:
    """Start engines, which take the place of the ``old`` ones, if there are any, once they serve.

    Raises as ``scale`` does.
    """
    check_room(new.settings)
    try:
        _run(new, timeout)
    except BaseException:
        serve.delete(new.application)
        raise
    new.save()
    if old is not None:
        log.info("The new engines serve: the old ones drain")
        old.forget()
        old.end()


def new_number() -> int:
    """One that no engines of this server had; several programs may ask at the same time."""
    return next(number for number in itertools.count() if _claim(number))


def _claim(number: int) -> bool:
    """Claim a number; whether nobody had."""
    key = f"{_NUMBERS}{number}"
    return not internal_kv._internal_kv_put(key, b"", overwrite=False, namespace=_NAMESPACE)


def _run(new: EngineSet, timeout: float | None) -> None:
    """Have Serve run engines; returns when it does. Raises EngineError if that is not in time."""
    if timeout is None:
        timeout = new.settings.router.startup_timeout
    serve.run_many([new.target()], wait_for_applications_running=False)
    _wait_until_it_runs(new, time.monotonic() + timeout)


def check_room(*models: Settings) -> None:
    """Raises ConfigError if the cluster has not free what all engines of models ask for: Serve
    would wait."""
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]
    asked = [_needed(settings) for settings in models]
    for name in dict.fromkeys(itertools.chain(*asked)):
        need = sum(one.get(name, 0) for one in asked)
        if need > free.get(name, 0):
            workers = [
                f"{settings.router.replica_bounds[0]} engines of"
                f" {settings.engine.parallel.world_size} workers"
                for settings in models
            ]
            raise ConfigError(
                f"{', '.join(workers)} need {need:g} {name}; of the cluster's,"
                f" {free.get(name, 0):g} are free (--worker-cpus, --worker-gpus and"
                " --worker-resource say what a worker asks for)"
            )


def _needed(settings: Settings) -> dict[str, float]:
    """What all engines of a model ask for, by the names of Ray's resources."""
    from cluster.engine_actor import amounts, needed

    parallel = settings.engine.parallel
    need = needed(settings.engine)
    if parallel.world_size > 1:  # its workers ask, not the engine; see RayLauncher
        alone = dataclasses.replace(parallel, tensor_parallel_size=1, pipeline_parallel_size=1)
        need = needed(dataclasses.replace(settings.engine, parallel=alone))
    count = settings.router.replica_bounds[0] * parallel.world_size
    return {name: value * count for name, value in amounts(need).items()}


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


def engines() -> dict[str, tuple[str, EngineLoad]]:
    """The model of each engine that answers, by its first name, and what the engine has to do; by
    its id."""

    async def asked() -> dict[str, tuple[str, EngineLoad]]:
        found = sorted(Directory(APPLICATION).find("engine").items())
        answers = await asyncio.gather(*(_ask(address) for _, address in found))
        return {id: answer for (id, _), answer in zip(found, answers, strict=True) if answer}

    return asyncio.run(asked())


async def _ask(address: str) -> tuple[str, EngineLoad] | None:
    """None where nobody answers: an engine that died leaves its entry to whoever finds it so."""
    try:
        client = await RemoteClient.open(address, timeout=2.0)
    except EngineError:
        return None
    answer = client.info.names[0], client.load
    await client.close()
    return answer


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
