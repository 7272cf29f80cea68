"""The models of a server that runs: one comes, is replaced, or leaves, and the others go on."""

from typing import Any

from cluster.joining import connect_ray
from deploy.engine_set import EngineSet, found_sets, introduce, new_number, set_of
from deploy.settings import Settings, of_server
from engine.errors import ConfigError


def add_model(
    model: str, replace: bool = False, timeout: float | None = None, **options: Any
) -> None:
    """Have the server on this cluster serve one more model; returns when it answers. It joins the
    cluster of RAY_ADDRESS, or of this machine, if it is in none.

    model: a checkpoint's folder, or a hub id. replace: the server has one of the same name (the
        first of ``served_model_name``, or else ``model``), whose place it takes once it serves.
        Requests go on at the new engines if they serve the same model and revision, else they
        finish where they are. timeout: seconds for its engines to serve; ``startup_timeout`` by
        default. options: of the engine, and of the server those that each model has of its own.

    Raises ConfigError, naming what is wrong, CheckpointError, and EngineError if its engines do not
    start: then all is as before.
    """
    connect_ray()
    sets = found_sets()
    settings = Settings.of_model(of_server(sets[0].options), {**options, "model": model})
    id, *_ = settings.names
    old = next((engines for engines in sets if engines.names[0] == id), None)
    if old is None and replace:
        raise ConfigError(f"the server has no model {id!r} to replace")
    if old is not None and not replace:
        raise ConfigError(f"the server has a model {id!r} already; it can be replaced")
    others = [engines for engines in sets if engines is not old]
    taken = {name for engines in others for name in engines.names} & set(settings.names)
    if taken:
        raise ConfigError(f"served_model_name: {min(taken)!r} is another model's name")
    beside = sum(engines.settings.router.replica_bounds[1] for engines in others)
    introduce(EngineSet.of(settings, new_number(), beside), old, timeout)


def remove_model(model: str) -> None:
    """Have the server on this cluster serve a model no longer. From then on its name is unknown;
    its requests have ``shutdown_timeout`` seconds to finish. Returns when its engines have gone.

    Raises ConfigError if the server has no such model or no other, and EngineError if there is no
    server.
    """
    connect_ray()
    engines = set_of(model)
    if len(found_sets()) == 1:
        raise ConfigError(f"{model!r} is the only model: stop the server instead")
    engines.forget()
    engines.end()
