"""``manta engines``, ``scale`` and ``drain``: what operators do to a server that runs."""

import argparse
import os
from typing import Any

from deploy.settings import SCALABLE
from engine.errors import ConfigError, EngineError
from engine.folders import TOKEN, RunFolder

_ADDRESS = "RAY_ADDRESS"


def add_commands(commands: Any) -> None:
    """Add them to the subparsers of ``manta``."""
    engines = commands.add_parser("engines", help="list the engines of a server that runs")
    engines.set_defaults(run=_engines, parser=engines)

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
    scale.set_defaults(run=_scale, parser=scale)

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
    drain.set_defaults(run=_drain, parser=drain)

    for parser in (engines, scale, drain):
        parser.add_argument(
            "--port",
            type=int,
            help="the port of the `manta serve`, where several run on this machine; without"
            " effect where RAY_ADDRESS names the cluster",
        )


def _engines(args: argparse.Namespace) -> None:
    join_server(args.port)
    from deploy.engine_set import engines

    for id, load in engines().items():
        state = "" if load.admits else "  recovering" if load.recovering else "  draining"
        print(f"{id}  {load.running} running  {load.waiting} waiting{state}")


def _scale(args: argparse.Namespace) -> None:
    changes = {name: getattr(args, name) for name in SCALABLE}
    if all(value is None for value in changes.values()):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in SCALABLE)
        raise ConfigError(f"scale needs at least one of {names}")
    join_server(args.port)
    from deploy.engine_set import scale

    scale(**changes)


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
