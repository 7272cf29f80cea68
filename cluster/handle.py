"""Handles: programs on a cluster share an engine that lives on its own, found by its name.

    manta.start_engine("shared", "path/or/hub-id", max_model_len=4096)    # once, anywhere

    engine = manta.connect("shared")                                      # in any driver
    outputs = engine.generate(["Hello", "The sky is"])
    for piece in engine.stream("Once upon a time"):                       # leaving it cancels
        print(piece.text, end="")

``connect_async`` gives the same with ``await`` and ``async for``. The engine goes on when its
drivers end, and frees what they had in flight; ``stop_engine`` ends it.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from cluster.attempts import Attempt
from cluster.client import EngineClient, EngineInfo, EngineLoad, Sink
from cluster.prompts import (
    Message,
    Prompt,
    Tokenized,
    chat_prompts,
    checked_priority,
    one_for_each,
    requests_of,
    text_prompts,
)
from cluster.streams import Route, Stream, settled
from cluster.transport import RemoteClient
from engine.chat import load_template
from engine.collector import Collector
from engine.continuation import Continuation
from engine.errors import EngineError, RequestError, Unavailable
from engine.grammar_trial import trial_of
from engine.log import get_logger
from engine.outputs import Piece, RequestOutput
from engine.sampling_params import SamplingParams
from engine.stats import Metric
from engine.tokenizer import Tokenizer

log = get_logger("handle")

LOOK_EVERY = 0.1  # seconds between two looks for the engine that takes a lost one's place
CONNECT_TIMEOUT = 10.0  # seconds for the engine that takes a lost one's place to answer

T = TypeVar("T")


class EngineRoute(Route, Protocol):
    """A route to one engine; ``client`` leads to it."""

    client: EngineClient


class NamedEngine:
    """The ``Route`` to an engine that is found by its name: when it is lost, to the one that takes
    its place. ``client`` leads to the last one."""

    def __init__(self, name: str, client: EngineClient) -> None:
        self.client = client
        self._name = name
        self._opening = asyncio.Lock()

    async def ready(self, seconds: float) -> bool:
        if seconds and not self.client.healthy:
            await asyncio.sleep(min(seconds, LOOK_EVERY))
        return seconds > 0  # there is no other of this name

    async def admit(self, request: Continuation, sink: Sink, leaving: bool = False) -> Attempt:
        if not self.client.healthy:
            async with self._opening:
                if not self.client.healthy:
                    client = await _open(self._name, CONNECT_TIMEOUT)
                    await self.client.close()
                    self.client = client
        try:
            return await self.client.submit(request, sink)
        except EngineError as error:
            if self.client.healthy:
                raise
            raise Unavailable(str(error), "starting") from error

    def moved(self, cause: str, seconds: float) -> None:
        log.info("A request went on at engine %r after %.2f s (%s)", self._name, seconds, cause)


class AsyncEngineHandle:
    """A named engine, for one asyncio loop; made by ``connect_async``."""

    def __init__(self, route: EngineRoute, tokenizer: Tokenizer) -> None:
        self._route = route
        self.tokenizer = tokenizer
        template = route.client.info.chat_template
        self._chat_template = None if template is None else load_template(template)

    @property
    def info(self) -> EngineInfo:
        """What the engine serves."""
        return self._route.client.info

    @property
    def load(self) -> EngineLoad:
        """What it has to do now."""
        return self._route.client.load

    @property
    def healthy(self) -> bool:
        """Whether it answers and makes progress."""
        return self._route.client.healthy

    async def metrics(self) -> list[Metric]:
        """What it has counted."""
        return await self._route.client.stats()

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """As ``LLM.generate``. If the caller is cancelled, so are its requests.

        A request whose engine is lost goes on at the one that takes its place. Raises RequestError
        for a wrong prompt or parameter, EngineError if none does within ``failover_timeout``.
        """
        return await self._run(
            text_prompts(self.tokenizer, prompts), sampling_params, priority, timeout
        )

    async def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """As ``LLM.chat``."""
        prompts = self._render(messages, template_options)
        return await self._run(prompts, sampling_params, priority, timeout)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """The completions of one prompt, piece by piece as they come.

        Closing the iterator cancels the request.
        """
        async with contextlib.aclosing(
            self._stream(
                text_prompts(self.tokenizer, prompt), sampling_params, priority, timeout
            )
        ) as pieces:  # fmt: skip
            async for piece in pieces:
                yield piece

    async def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        **template_options: Any,
    ) -> AsyncGenerator[Piece, None]:
        """The answers to one conversation, piece by piece."""
        prompts = self._render(messages, template_options)
        async with contextlib.aclosing(
            self._stream(prompts, sampling_params, priority, timeout)
        ) as pieces:
            async for piece in pieces:
                yield piece

    async def close(self) -> None:
        """Leave the engine; what this handle has in flight there ends."""
        await self._route.client.close()

    # ---- inside ----

    def _render(self, messages: Any, options: dict[str, Any]) -> list[Tokenized]:
        template = options.pop("chat_template", None)
        return chat_prompts(
            self.tokenizer,
            messages,
            self._chat_template if template is None else load_template(template),
            **options,
        )

    def _requests(
        self,
        prompts: list[Tokenized],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None,
        timeout: float | None,
    ) -> list[Continuation]:
        params = one_for_each(sampling_params, self.info.default_sampling, len(prompts))
        priorities = checked_priority(priority, self.info.scheduling_policy, len(prompts))
        ids = iter(lambda: uuid.uuid4().hex, "")
        return requests_of(self.tokenizer, prompts, params, priorities, timeout, ids)

    def _stream_of(self, request: Continuation) -> Stream:
        return Stream(request, self._route, self.info.failover)

    async def _check_outputs(self, sampling: SamplingParams, where: str = "") -> None:
        info = self.info
        if sampling.structured_outputs is not None:
            trial = trial_of(info.tokenizer, info.revision, info.vocab_size)
            try:
                await trial.checked(sampling.structured_outputs)
            except RequestError as error:
                raise RequestError(f"{where}{error}") from None

    async def _run(
        self,
        prompts: list[Tokenized],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None,
        timeout: float | None,
    ) -> list[RequestOutput]:
        requests = self._requests(prompts, sampling_params, priority, timeout)
        for number, request in enumerate(requests):
            await self._check_outputs(request.sampling, f"prompt {number}: ")
        streams = [self._stream_of(request) for request in requests]

        async def start(number: int, stream: Stream) -> None:
            try:
                await stream.start()
            except RequestError as error:
                raise type(error)(f"prompt {number}: {error}") from None

        async def collect(stream: Stream, collector: Collector) -> None:
            async for outcomes in stream:
                collector.take(outcomes, stream.stop_at_text)

        try:
            await settled(start(*numbered) for numbered in enumerate(streams))
            collectors = [
                Collector(request, text, self.tokenizer, stream.metrics)
                for request, stream, (text, _) in zip(requests, streams, prompts, strict=True)
            ]
            await settled(map(collect, streams, collectors))
            return [collector.output for collector in collectors]
        finally:
            for stream in streams:
                stream.cancel()

    async def _stream(
        self,
        prompts: list[Tokenized],
        sampling_params: SamplingParams | None,
        priority: int,
        timeout: float | None,
    ) -> AsyncGenerator[Piece, None]:
        if len(prompts) != 1:
            raise RequestError(f"a stream has one prompt, got {len(prompts)}")
        (request,) = self._requests(prompts, sampling_params, [priority], timeout)
        await self._check_outputs(request.sampling)
        stream = self._stream_of(request)
        text = prompts[0][0]
        collector = Collector(request, text, self.tokenizer, stream.metrics, streaming=True)
        try:
            await stream.start()
            async for outcomes in stream:
                for piece in collector.take(outcomes, stream.stop_at_text):
                    yield piece
        finally:
            stream.cancel()


class EngineHandle:
    """A named engine, for programs without asyncio; made by ``connect``. Threads may share it."""

    def __init__(self, name: str, timeout: float) -> None:
        from cluster.joining import connect_ray

        connect_ray()  # here, in the program's thread: Ray sets signal handlers in the main one
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="manta-handle", daemon=True
        )
        self._thread.start()
        try:
            self._handle = self._call(connect_async(name, timeout))
        except BaseException:
            self._stop()
            raise

    @property
    def info(self) -> EngineInfo:
        """What the engine serves."""
        return self._handle.info

    @property
    def load(self) -> EngineLoad:
        """What it has to do now."""
        return self._handle.load

    @property
    def healthy(self) -> bool:
        """Whether it answers and makes progress."""
        return self._handle.healthy

    def metrics(self) -> list[Metric]:
        """What it has counted."""
        return self._call(self._handle.metrics())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """As ``LLM.generate``; an interrupt cancels. Raises EngineError if the engine dies."""
        return self._call(
            self._handle.generate(prompts, sampling_params, priority=priority, timeout=timeout)
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """As ``LLM.chat``."""
        return self._call(self._handle.chat(messages, sampling_params, **options))

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Iterator[Piece]:
        """The completions of one prompt, piece by piece; leaving the loop cancels the request."""
        return self._pieces(
            self._handle.stream(prompt, sampling_params, priority=priority, timeout=timeout)
        )

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """The answers to one conversation, piece by piece."""
        return self._pieces(self._handle.stream_chat(messages, sampling_params, **options))

    def close(self) -> None:
        """Leave the engine; what this handle has in flight there ends."""
        if self._thread.is_alive():
            self._call(self._handle.close())
            self._stop()

    def __enter__(self) -> "EngineHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ----

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except (KeyboardInterrupt, concurrent.futures.CancelledError):
            future.cancel()
            raise

    def _pieces(self, pieces: AsyncGenerator[Piece, None]) -> Iterator[Piece]:
        async def following() -> Piece | None:
            return await anext(pieces, None)

        try:
            while (piece := self._call(following())) is not None:
                yield piece
        finally:
            self._call(pieces.aclose())

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def start_engine(name: str, model: str, **options: Any) -> EngineHandle:
    """Start an engine of its own life under ``name``, and connect to it.

    ``options`` are those of ``LLM``. Raises ConfigError or CheckpointError as it does, and if the
    name is taken or the cluster has no room.
    """
    from cluster.engine_actor import start_actor

    start_actor(name, {"model": model, **options})
    return connect(name)


def connect(name: str, timeout: float = 60.0) -> EngineHandle:
    """A handle on the engine called ``name``, from any driver of the cluster.

    Raises EngineError if there is none, or it is not ready within ``timeout`` seconds.
    """
    return EngineHandle(name, timeout)


async def connect_async(name: str, timeout: float = 60.0) -> AsyncEngineHandle:
    """``connect`` for programs on asyncio; the handle belongs to the running loop."""
    client = await _open(name, timeout)
    info = client.info
    try:
        tokenizer = await asyncio.to_thread(
            Tokenizer.load, info.tokenizer, info.revision, info.chat_options
        )
    except BaseException:
        await client.close()
        raise
    return AsyncEngineHandle(NamedEngine(name, client), tokenizer)


async def _open(name: str, timeout: float) -> RemoteClient:
    from cluster.engine_actor import find_actor

    address = await asyncio.to_thread(find_actor, name, timeout)
    return await RemoteClient.open(address, timeout)


def stop_engine(name: str, drain_seconds: float = 0.0) -> None:
    """End the engine called ``name``, after at most ``drain_seconds`` for what runs.

    Raises EngineError if there is none.
    """
    from cluster.engine_actor import stop_actor

    stop_actor(name, drain_seconds)
