"""``manta serve``: its arguments, and where its options come from."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from deploy.options import add_model_option, add_options, from_words, given, given_model
from engine.config import EMBEDDED_MODEL
from engine.errors import ConfigError
from engine.log import get_logger, set_format
from engine.vllm_options import translated

if TYPE_CHECKING:
    from deploy.settings import Settings

log = get_logger("serve")

KEY_VARIABLE = "MANTA_API_KEY"


def add_command(commands: Any) -> None:
    """Add ``serve`` to the subparsers of ``manta``."""
    from deploy.settings import server_options

    serve = commands.add_parser(
        "serve",
        help="serve a model over the OpenAI API",
        usage="manta serve [OPTION ...] [MODEL]",
        description="Serve a model over the OpenAI API, on Ray: on the cluster that RAY_ADDRESS"
        " names, or on one that is started on this machine. SIGTERM or Ctrl-C finishes what runs;"
        " a second one does not.",
    )
    serve.add_argument("model", nargs="?", help=f"default: {EMBEDDED_MODEL}")
    add_model_option(serve)
    serve.add_argument(
        "--config",
        metavar="FILE",
        help="options as YAML, under their names; those of the command line go before. For several"
        " models `models` is a list of their options",
    )
    serve.add_argument(
        "--print-serve-config",
        action="store_true",
        help="write a configuration for `serve deploy`, and stop",
    )
    serve.add_argument(
        "--print-kuberay",
        action="store_true",
        help="write a RayService for Kubernetes with KubeRay, and stop",
    )
    serve.add_argument(
        "--gpus-per-node",
        type=int,
        default=None,
        metavar="INT",
        help="with --print-kuberay: GPUs that a node has (default: 8)",
    )
    add_options(serve, server_options())
    serve.set_defaults(run=_run, parser=serve)


def _run(args: argparse.Namespace) -> None:
    models = _models(args)
    settings = models[0]
    set_format(settings.router.log_format)
    settings.router.keys()
    if args.gpus_per_node is not None and not args.print_kuberay:
        raise ConfigError("--gpus-per-node needs --print-kuberay")
    if args.print_kuberay:
        from deploy.kuberay import GPUS_PER_NODE, manifest

        given_gpus = args.gpus_per_node
        print(manifest(models, GPUS_PER_NODE if given_gpus is None else given_gpus), end="")
        return
    if args.print_serve_config:
        from deploy.serve_config import serve_config

        if settings.router.api_key:
            log.warning("The configuration holds the API keys themselves: see --api-key-file")
        print(serve_config(models), end="")
        return
    if settings.router.otlp_endpoint is not None:
        from router.tracing import check_installed

        check_installed()
    _check_files(settings.router.ssl_certfile, settings.router.ssl_keyfile)
    from deploy.server import run

    raise SystemExit(run(models))


def _models(args: argparse.Namespace) -> "list[Settings]":
    """The settings of each model that the file and the command line name. Raises ConfigError."""
    from deploy.settings import Settings, read_config, server_options

    names = [f.name for _, f in server_options()]
    in_file = read_config(args.config) if args.config else {}
    several = in_file.pop("models", None)
    options = translated(from_words(in_file, server_options()), names)
    options |= translated(given(args, server_options()), names)
    _add_key(args, options)
    if several is not None:
        if (model := given_model(args)) is not None:
            raise ConfigError(f"{args.config} has models: {model} cannot be given beside them")
        return Settings.of_models(options, several)
    if args.model is None and args.model_option is None and "model" in options:
        args.model = options["model"]
    options["model"] = given_model(args) or EMBEDDED_MODEL
    return [Settings.from_options(options).completed()]


def _add_key(args: argparse.Namespace, options: dict[str, Any]) -> None:
    if "api_key" not in options and os.environ.get(KEY_VARIABLE):
        options["api_key"] = (os.environ[KEY_VARIABLE],)
    if getattr(args, "api_key", None):
        log.warning(
            "--api-key can be read in the list of processes: --api-key-file and %s cannot",
            KEY_VARIABLE,
        )


def _check_files(*names: str | None) -> None:
    for name in names:
        if name is not None and not os.path.isfile(name):
            raise ConfigError(f"there is no file {name!r}")
