"""``manta run-batch``: the answers to a file of requests, through the router's own code, over
engines of its own or those of a server that runs.

It holds as many lines as are asked at once, and some tens of bytes for each that it has read. A
line's answer is in the output before the line is forgotten, so the same command goes on where an
earlier one was interrupted.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.options import Declared, add_model_option, add_options, flag, given, given_model
from engine.config import EMBEDDED_MODEL, declared_options
from engine.errors import ConfigError, EngineError
from engine.log import get_logger
from engine.vllm_options import translated

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI

    from cluster.client import EngineClient
    from cluster.progress import PromptBar
    from deploy.batch_file import Answered, Asked, Line, Output, Problem
    from deploy.settings import Settings

log = get_logger("batch")

# Of the server's options those that have a meaning without HTTP.
ROUTER_OPTIONS = (
    "served_model_name",
    "tool_call_parser",
    "reasoning_parser",
    "allow_unknown_fields",
    "trust_request_chat_template",
    "max_body_bytes",
    "request_timeout",
    "otlp_endpoint",
    "num_replicas",
)
LOOK_EVERY = 1.0  # seconds between two looks whether an engine is left


def add_command(commands: Any) -> None:
    """Add ``run-batch`` to the subparsers of ``manta``."""
    batch = commands.add_parser(
        "run-batch",
        help="answer a file of requests, offline",
        usage="manta run-batch -i FILE -o FILE [OPTION ...] [MODEL]",
        description="Answer the requests of a file in OpenAI's batch format, a line each, with"
        " engines of its own (--num-replicas of them on a Ray cluster, if more than one) or those"
        " of a server. A wrong line has its error in the output. What the output has already is"
        " not asked again: the same command goes on where one was interrupted.",
    )
    batch.add_argument("model", nargs="?", help=f"default: {EMBEDDED_MODEL}")
    add_model_option(batch)
    batch.add_argument(
        "-i", "--input-file", required=True, metavar="FILE", help="requests, a line of JSON each"
    )
    batch.add_argument(
        "-o", "--output-file", required=True, metavar="FILE", help="answers, as they come"
    )
    batch.add_argument(
        "--max-concurrency",
        type=int,
        metavar="INT",
        help="most requests at once (default: twice --max-num-seqs for each engine)",
    )
    batch.add_argument(
        "--join",
        action="store_true",
        help="ask the engines of the `manta serve` on this machine, or on the cluster that"
        " RAY_ADDRESS names",
    )
    batch.add_argument(
        "--port", type=int, help="with --join: its port, where several run on this machine"
    )
    batch.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    add_options(batch, _options())
    batch.set_defaults(run=_run, parser=batch)


def _options() -> Declared:
    from deploy.settings import server_options

    return [
        (group, f) for group, f in server_options() if group != "server" or f.name in ROUTER_OPTIONS
    ]


def _run(args: argparse.Namespace) -> None:
    from deploy import batch_file

    source, target = Path(args.input_file), Path(args.output_file)
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency must be at least 1, got {args.max_concurrency}")
    if args.port is not None and not args.join:
        raise ConfigError("--port needs --join: it is that of the server")
    total = batch_file.count(source)
    if target.exists() and source.samefile(target):
        raise ConfigError("--output-file: it is the input file")
    options = translated(given(args, _options()), [f.name for _, f in _options()])
    with batch_file.Output(target) as output:
        if all(line in output for line in batch_file.lines(source)):
            log.info("The output has all %d answers", total)
            return
        with _engines(args, options) as (settings, name):
            batch = _Batch(settings, output, total, args.max_concurrency, not args.disable_tqdm)
            try:
                asyncio.run(batch.run(batch_file.lines(source), name))
            finally:
                batch.report()


@contextlib.contextmanager
def _engines(
    args: argparse.Namespace, options: dict[str, Any]
) -> Iterator[tuple["Settings", str | None]]:
    """The settings, and the name of the ``Directory`` of engines; None is one in this process."""
    from deploy.settings import Settings

    model = given_model(args)
    if args.join:
        yield _of_server(args.port, options if model is None else {"model": model, **options})
        return
    options["model"] = model or EMBEDDED_MODEL
    settings = Settings.from_options(options).completed()
    if settings.router.num_replicas == 1:
        yield settings, None
        return
    from cluster.engine_actor import own_engines

    batch = f"batch-{uuid.uuid4().hex[:8]}"
    count = settings.router.num_replicas
    with own_engines(batch, _engine_options(settings), count, settings.router.served) as name:
        yield settings, name


def _of_server(port: int | None, options: dict[str, Any]) -> tuple["Settings", str]:
    """The settings of a server that runs, with ``options`` instead of its own.

    Raises ConfigError for those that only its engines could have.
    """
    from deploy.control import join_server
    from deploy.settings import OF_A_MODEL, Settings

    for name in options:
        if name not in ROUTER_OPTIONS or name in OF_A_MODEL:
            raise ConfigError(f"{flag(name)} with --join: the engines are the server's")
    join_server(port)
    from deploy.engine_set import found_sets
    from deploy.serve import APPLICATION

    return Settings.from_options({**found_sets()[0].options, **options}), APPLICATION


def _engine_options(settings: "Settings") -> dict[str, Any]:
    """Those of the given options that are the engine's."""
    names = {f.name for _, f in declared_options()}
    return {name: value for name, value in settings.options.items() if name in names}


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Body(msgspec.Struct):
    """What the bar shows of an answer; chats and completions, and responses, have other names."""

    usage: _Usage | None = None


class _Streaming(msgspec.Struct):
    stream: bool | None = None


class _Batch:
    """One run. ``total``: the lines of the input."""

    def __init__(
        self,
        settings: "Settings",
        output: "Output",
        total: int,
        max_concurrency: int | None,
        show: bool,
    ) -> None:
        self._settings = settings
        self._output = output
        self._total = total
        self._max_concurrency = max_concurrency
        self._show = show
        self._answered = self._wrong = self._skipped = 0

    async def run(self, lines: Iterator["Line"], name: str | None) -> None:
        """Answer the lines. Raises EngineError if no engine is left, or none is there."""
        import httpx

        from cluster.progress import PromptBar

        async with self._app(name) as (app, engines, patience):
            await app.state.service.model()
            seqs = self._settings.engine.scheduler.max_num_seqs
            at_once = self._max_concurrency or 2 * seqs * len(engines)
            paths = _paths(app)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://batch") as client:
                with PromptBar(self._total, self._show, len(self._output)) as bar:
                    works = [self._work(client, paths, lines, bar) for _ in range(at_once)]
                    await _while_engines_are_left(engines, patience, works)

    def report(self) -> None:
        """Say what has become of the lines."""
        log.info(
            "%d lines: %d answered, %d with an error, %d were in the output before, %d are left",
            self._total,
            self._answered,
            self._wrong,
            self._skipped,
            self._total - self._answered - self._wrong - self._skipped,
        )

    @contextlib.asynccontextmanager
    async def _app(
        self, name: str | None
    ) -> AsyncIterator[tuple["FastAPI", Collection["EngineClient"], float]]:
        """The router's application, its engines, and for how many seconds there may be none."""
        from manta import __version__
        from router.app import build_app

        router = self._settings.router
        config = dataclasses.replace(router, api_key=(), api_key_file=None, dashboard=False)
        if name is None:
            # The engine's threads are to let go of the cores while the router runs between two
            # kernels, as in ``cluster.engine_actor.take_cores``; torch reads it when it is loaded.
            os.environ.setdefault("GOMP_SPINCOUNT", "3000")
            from cluster.loop import LocalClient

            client = await LocalClient.start(**_engine_options(self._settings))
            client.info = dataclasses.replace(client.info, served=router.served)
            try:
                yield build_app(config, [client], __version__), [client], 0.0
            finally:
                await client.close()
            return
        from cluster.engines import Engines

        engines = Engines(name)
        await engines.open()
        await engines.look()
        patience = self._settings.engine.failover.failover_timeout
        try:
            yield build_app(config, engines, __version__, look=engines.look), engines, patience
        finally:
            await engines.close()

    async def _work(
        self,
        client: "httpx.AsyncClient",
        paths: Collection[str],
        lines: Iterator["Line"],
        bar: "PromptBar",
    ) -> None:
        """Answer one line after the other, until there is none."""
        for line in lines:
            if line in self._output:
                self._skipped += 1
                continue
            answered = await _answer(client, paths, line)
            self._output.add(answered)
            if answered.response is None or answered.response.status_code >= 400:
                self._wrong += 1
                bar.add(0, 0)
            else:
                self._answered += 1
                bar.add(*_tokens(answered.response.body))


async def _while_engines_are_left(
    engines: Collection["EngineClient"],
    patience: float,
    works: Sequence[Coroutine[Any, Any, None]],
) -> None:
    """Run all side by side to their ends.

    Raises EngineError once no engine has been well for ``patience`` seconds.
    """

    async def watch() -> None:
        well = time.monotonic()
        while True:
            if any(engine.healthy for engine in engines):
                well = time.monotonic()
            elif time.monotonic() - well >= patience:
                break
            await asyncio.sleep(LOOK_EVERY)
        raise EngineError("no engine is left; the same command goes on where this one ends")

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            await asyncio.gather(*map(group.create_task, works))
            watching.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _paths(app: "FastAPI") -> set[str]:
    """The routes that answer a request with a body."""
    from fastapi.routing import APIRoute

    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return {r.path for r in routes if r.path.startswith("/v1/") and "POST" in (r.methods or ())}


async def _answer(client: "httpx.AsyncClient", paths: Collection[str], line: "Line") -> "Answered":
    """What comes of a line; while the engines have no room for it, it waits."""
    from deploy.batch_file import Answered, Problem, Response

    asked = line.asked
    if not isinstance(asked, Problem):
        asked = _refusal(asked, paths) or asked
    if isinstance(asked, Problem):
        return Answered(line.id, line.custom_id, error=asked)
    headers = {"content-type": "application/json"}
    while True:
        answer = await client.post(asked.url, content=bytes(asked.body), headers=headers)
        if answer.status_code not in (429, 503):
            break
        await asyncio.sleep(float(answer.headers["retry-after"]))
    id, body = answer.headers.get("x-request-id"), msgspec.Raw(answer.content)
    return Answered(line.id, line.custom_id, Response(answer.status_code, id, body))


def _refusal(asked: "Asked", paths: Collection[str]) -> "Problem | None":
    """What is wrong with what a line asks, if its route could not tell."""
    from deploy.batch_file import Problem

    if asked.method != "POST":
        return Problem("invalid_method", f"method must be POST, got {asked.method[:20]!r}")
    if asked.url not in paths:
        known = ", ".join(sorted(paths))
        return Problem("invalid_url", f"url must be one of {known}, got {asked.url[:100]!r}")
    with contextlib.suppress(msgspec.DecodeError):  # which the route will tell of
        if msgspec.json.decode(asked.body, type=_Streaming).stream:
            return Problem("unsupported_value", "stream: a batch has whole answers")
    return None


def _tokens(body: msgspec.Raw) -> tuple[int, int]:
    """The tokens of prompt and output that an answer tells."""
    try:
        usage = msgspec.json.decode(body, type=_Body).usage or _Usage()
    except msgspec.DecodeError:
        usage = _Usage()
    return (
        usage.prompt_tokens + usage.input_tokens,
        usage.completion_tokens + usage.output_tokens,
    )
