"""A stage of Ray Data that completes prompts or answers chats, a row each, in engines of its own.

The names of arguments and columns are those of ``ray.data.llm``.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from cluster.attempts import Attempt
from cluster.client import EngineClient, Sink
from cluster.handle import AsyncEngineHandle
from engine.config import EngineConfig
from engine.continuation import Continuation
from engine.errors import ConfigError, RequestError
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

Row = dict[str, Any]
ASKS = ("messages", "prompt", "prompt_token_ids")
_OF_CHATS = ("tools", "chat_template_kwargs")


def build_processor(
    model: str | PathLike[str],
    preprocess: Callable[[Row], Row] | None = None,
    postprocess: Callable[[Row], Row] | None = None,
    *,
    concurrency: int = 1,
    batch_size: int = 64,
    **options: Any,
) -> Callable[["Dataset"], "Dataset"]:
    """A function from a dataset to one with what the model says to each row.

    preprocess: makes a row that has ``messages``, ``prompt`` or ``prompt_token_ids``, and perhaps
        ``sampling_params`` (a dict or SamplingParams), ``tools`` and ``chat_template_kwargs``;
        without it the dataset has such rows. Other columns are kept.
    postprocess: makes the row that is given on of one that has ``generated_text``,
        ``generated_tokens``, ``num_input_tokens``, ``num_generated_tokens`` and ``finish_reason``
        besides. A row that is wrong has what is wrong in ``error``, which is None in the others.
        Of several completions (``n``) it has the first.
    concurrency: engines. Each has up to four batches of ``batch_size`` rows at once.
    options: those of ``LLM``.

    Raises ConfigError, naming the option and what is allowed.
    """
    for name, value in (("concurrency", concurrency), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    options = {"model": str(model), "max_failovers": 0, **options}
    config = EngineConfig.from_options(**options)

    def process(dataset: "Dataset") -> "Dataset":
        from cluster.engine_actor import needed
        from cluster.joining import connect_ray

        connect_ray()
        return dataset.map_batches(
            _Stage,
            batch_size=batch_size,
            batch_format="pyarrow",
            concurrency=concurrency,
            fn_constructor_args=(options, concurrency, preprocess, postprocess),
            **needed(config),
        )

    return process


class _OwnEngine:
    """The ``Route`` to an engine of this process, which nothing replaces."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client

    async def ready(self, seconds: float) -> bool:
        return self.client.healthy

    async def admit(self, request: Continuation, sink: Sink, leaving: bool = False) -> Attempt:
        return await self.client.submit(request, sink)

    def moved(self, cause: str, seconds: float) -> None:
        pass


class _Stage:
    """What runs in each process of the stage; batches come side by side."""

    def __init__(
        self,
        options: Row,
        share: int,
        preprocess: Callable[[Row], Row] | None,
        postprocess: Callable[[Row], Row] | None,
    ) -> None:
        self._options, self._share = options, share
        self._preprocess, self._postprocess = preprocess, postprocess

    async def __call__(self, batch: "pyarrow.Table") -> AsyncIterator["pyarrow.Table"]:
        """The rows of a batch with their answers."""
        import pyarrow

        engine = await self._engine
        rows = await asyncio.gather(*(self._row(engine, row) for row in batch.to_pylist()))
        yield pyarrow.Table.from_pylist(rows)

    @cached_property
    def _engine(self) -> "asyncio.Task[AsyncEngineHandle]":
        return asyncio.create_task(self._start())  # in the loop that uses it

    async def _start(self) -> AsyncEngineHandle:
        from cluster.engine_actor import take_cores

        take_cores(EngineConfig.from_options(**self._options), self._share)
        from cluster.loop import LocalClient

        client = await LocalClient.start(**self._options)
        info = client.info
        tokenizer = Tokenizer.load(info.tokenizer, info.revision, info.chat_options)
        return AsyncEngineHandle(_OwnEngine(client), tokenizer)

    async def _row(self, engine: AsyncEngineHandle, row: Row) -> Row:
        if self._preprocess is not None:
            row = self._preprocess(row)
        row = {**row, **await _answer(engine, row)}
        return row if self._postprocess is None else self._postprocess(row)


async def _answer(engine: AsyncEngineHandle, row: Row) -> Row:
    """The columns that a row gets."""
    answer: Row = dict.fromkeys(
        (
            "generated_text",
            "generated_tokens",
            "num_input_tokens",
            "num_generated_tokens",
            "finish_reason",
            "error",
        )
    )
    try:
        (output,) = await _ask(engine, row)
    except RequestError as error:
        return {**answer, "error": str(error).removeprefix("prompt 0: ")}
    first = output.outputs[0]
    return {
        "generated_text": first.text,
        "generated_tokens": first.token_ids,
        "num_input_tokens": len(output.prompt_token_ids),
        "num_generated_tokens": len(first.token_ids),
        "finish_reason": first.finish_reason,
        "error": first.stop_reason if first.finish_reason == "error" else None,
    }


async def _ask(engine: AsyncEngineHandle, row: Row) -> list[Any]:
    asks = [name for name in ASKS if row.get(name) is not None]
    if len(asks) != 1:
        found = " and ".join(asks) or f"only {', '.join(row)}"
        raise RequestError(f"a row must have one of {', '.join(ASKS)}; it has {found}")
    sampling = _sampling(row.get("sampling_params"), engine.info.default_sampling)
    if asks == ["messages"]:
        options = {name: row[name] for name in _OF_CHATS if row.get(name) is not None}
        return await engine.chat(row["messages"], sampling, **options)
    return await engine.generate({asks[0]: row[asks[0]]}, sampling)


def _sampling(given: Any, defaults: SamplingParams) -> SamplingParams:
    """Raises RequestError for a wrong field."""
    if given is None:
        return defaults
    if isinstance(given, SamplingParams):
        return given
    if not isinstance(given, Mapping):
        raise RequestError(f"sampling_params must be a dict, got {given!r}")
    # A dataset's rows have every key that one of them has; null asks for nothing.
    asked = {name: value for name, value in given.items() if value is not None}
    try:
        return dataclasses.replace(defaults, **asked)
    except TypeError as error:
        raise RequestError(f"sampling_params: {error}") from None
