"""``manta engines``, ``models``, ``scale`` and so on: what operators do to a server that runs."""

import argparse
import os
from collections import Counter
from typing import Any

from deploy.options import add_model_option, add_options, given, given_model
from deploy.settings import SCALABLE, model_options, read_config
from engine.errors import ConfigError, EngineError
from engine.folders import TOKEN, RunFolder

_ADDRESS = "RAY_ADDRESS"


def add_commands(commands: Any) -> None:
    """Add them to the subparsers of ``manta``."""
    engines = commands.add_parser("engines", help="list the engines of a server that runs")
    engines.set_defaults(run=_engines)
    models = commands.add_parser("models", help="list the models of a server that runs")
    models.set_defaults(run=_models)
    changes = (_add_scale, _add_drain, _add_add_model, _add_remove_model)
    for parser in (engines, models, *(add(commands) for add in changes)):
        parser.set_defaults(parser=parser)
        parser.add_argument(
            "--port",
            type=int,
            help="the port of the `manta serve`, where several run on this machine; without"
            " effect where RAY_ADDRESS names the cluster",
        )


def _add_scale(commands: Any) -> Any:
    scale = commands.add_parser(
        "scale",
        help="change the number, shape or revision of a server's engines",
        description="Change the engines of a server that runs, without losing a request. New"
        " engines start before old ones leave; requests move to them. It ends when that is done.",
    )
    scale.add_argument("--num-replicas", type=int, metavar="N", help="engines")
    scale.add_argument("--min-replicas", type=int, metavar="N", help="engines at least, and")
    scale.add_argument("--max-replicas", type=int, metavar="N", help="at most, by the load")
    scale.add_argument("--tensor-parallel-size", type=int, metavar="N", help="ranks of an engine")
    scale.add_argument("--pipeline-parallel-size", type=int, metavar="N", help="stages of one")
    scale.add_argument("--revision", help="of the checkpoint")
    scale.add_argument("--model", metavar="NAME", help="of which model, where there are several")
    scale.set_defaults(run=_scale)
    return scale


def _add_drain(commands: Any) -> Any:
    drain = commands.add_parser(
        "drain",
        help="have an engine hand over its requests and end",
        description="Have an engine hand over its requests to the others and end; Serve starts"
        " another in its place. `manta engines` lists them.",
    )
    drain.add_argument("engine", help="its id")
    drain.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait for its end; default 60"
    )
    drain.set_defaults(run=_drain)
    return drain


def _add_add_model(commands: Any) -> Any:
    add = commands.add_parser(
        "add-model",
        help="have a server that runs serve one more model, or another under the same name",
        usage="manta add-model [OPTION ...] MODEL",
        description="Have a server that runs serve one more model, with its own engines and"
        " options. It ends when the model answers; the other models go on as they are.",
    )
    add.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint's folder, or a hub id")
    add_model_option(add)
    add.add_argument("--config", metavar="FILE", help="its options as YAML, under their names")
    add.add_argument(
        "--replace",
        action="store_true",
        help="take the place of the model of the same name, once the new engines serve",
    )
    add_options(add, model_options())
    add.set_defaults(run=_add_model)
    return add


def _add_remove_model(commands: Any) -> Any:
    remove = commands.add_parser(
        "remove-model",
        help="have a server that runs serve a model no longer",
        description="Have a server that runs serve a model no longer. Requests that it has may"
        " finish; the other models go on as they are.",
    )
    remove.add_argument("name", metavar="NAME", help="one of its names; `manta models` lists them")
    remove.set_defaults(run=_remove_model)
    return remove


def _engines(args: argparse.Namespace) -> None:
    join_server(args.port)
    from deploy.engine_set import engines

    for id, (model, load) in engines().items():
        state = "" if load.admits else "  recovering" if load.recovering else "  draining"
        print(f"{id}  {model}  {load.running} running  {load.waiting} waiting{state}")


def _models(args: argparse.Namespace) -> None:
    join_server(args.port)
    from deploy.engine_set import engines, found_sets

    there = Counter(model for model, _ in engines().values())
    for one in found_sets():
        id, *others = one.names
        also = f"  also {', '.join(others)}" if others else ""
        count = f"{there[id]} engine{'' if there[id] == 1 else 's'}"
        print(f"{id}  {count}  {one.settings.engine.model.model}{also}")


def _add_model(args: argparse.Namespace) -> None:
    options = read_config(args.config) if args.config else {}
    options |= given(args, model_options())
    if (model := given_model(args)) is not None:
        options["model"] = model
    if options.get("model") is None:
        raise ConfigError("MODEL is missing: a checkpoint's folder, or a hub id")
    join_server(args.port)
    from deploy.models import add_model

    add_model(replace=args.replace, **options)


def _remove_model(args: argparse.Namespace) -> None:
    join_server(args.port)
    from deploy.models import remove_model

    remove_model(args.name)


def _scale(args: argparse.Namespace) -> None:
    changes = {name: getattr(args, name) for name in SCALABLE}
    if all(value is None for value in changes.values()):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in SCALABLE)
        raise ConfigError(f"scale needs at least one of {names}")
    join_server(args.port)
    from deploy.engine_set import scale

    scale(model=args.model, **changes)


def _drain(args: argparse.Namespace) -> None:
    join_server(args.port)
    from deploy.engine_set import drain

    drain(args.engine, args.timeout)


def join_server(port: int | None) -> None:
    """Join the cluster of RAY_ADDRESS, or that of the ``manta serve`` on this machine.

    Raises ConfigError or EngineError if there is none, or several.
    """
    if not os.environ.get(_ADDRESS):
        _name_own_ray(port)
    from cluster.joining import connect_ray

    connect_ray()


def _name_own_ray(port: int | None) -> None:
    """Name the Ray of the ``manta serve`` on this machine in the environment."""
    found = {
        folder: said
        for folder, said in RunFolder.notes().items()
        if port is None or said.get("port") == str(port)
    }
    if not found:
        raise EngineError(
            "no `manta serve` of this user runs on this machine"
            + ("" if port is None else f" at port {port}")
            + f"; name its cluster with {_ADDRESS}"
        )
    if len(found) > 1:
        ports = ", ".join(sorted(said["port"] for said in found.values()))
        raise ConfigError(f"several servers run on this machine: give --port, one of {ports}")
    ((folder, said),) = found.items()
    os.environ[_ADDRESS] = said["ray"]
    if (token := folder / TOKEN).exists():  # Ray reads it when it is imported, and never again
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
