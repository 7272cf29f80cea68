"""What all routes share: the engines, the model that they serve, and a request's way to one."""

import asyncio
import contextlib
import hashlib
import math
import time
import uuid
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ParamSpec, TypeVar

from cluster.attempts import Attempt
from cluster.client import EngineClient, EngineInfo, Sink
from cluster.streams import Stream, settled
from engine.chat import load_template
from engine.collector import Collector
from engine.continuation import Continuation, begin
from engine.errors import EngineError, QueueFull, Unavailable
from engine.sampling_params import SamplingParams
from engine.stats import Metric
from engine.tokenizer import Tokenizer
from router.balance import Balancer
from router.config import RouterConfig
from router.errors import ApiError, too_long
from router.generation import Generation, Prompt
from router.metrics import Sources, collect, render
from router.rendering import Renderer
from router.states import engines_by_id, engines_metric
from router.stats import RouterStats

INLINE_CHARACTERS = 4096  # longer texts are made tokens in a thread, off the event loop
HEAVY_THREADS = 2  # for what takes milliseconds; no more of it at once, for memory's sake
# Seconds beside its own start until an engine that died has a successor: Serve notices, and starts
# a process.
REPLACING = 5.0
MOST_RETRY_AFTER = 60  # OpenAI's clients heed no more
WATCH_EVERY = 0.05  # seconds between two looks for an engine, where requests wait for one
ADMISSION_PATIENCE = 5.0  # seconds for an engine to queue a request, if another might


P = ParamSpec("P")
T = TypeVar("T")
# Gives the metrics of other ingress processes by their ids.
Others = Callable[[], Awaitable[Mapping[str, list[Metric]]]]
# Brings the live set of engines up to date.
Look = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class ServedModel:
    """What the engines serve, as the routes need it."""

    info: EngineInfo
    tokenizer: Tokenizer
    chat_template: str | None
    names: tuple[str, ...]
    fingerprint: str
    created: int

    @cached_property
    def _facts(self) -> EngineInfo:
        return _facts(self.info)

    def fits(self, engine: EngineClient) -> bool:
        """Whether an engine serves just this; during an update there may be others."""
        return _facts(engine.info) == self._facts


def _facts(info: EngineInfo) -> EngineInfo:
    return replace(info, engine_id="", num_device_blocks=0, num_cpu_blocks=0, start_seconds=0.0)


class Service:
    """The state of one ingress process. ``engines`` is live: engines come and go in it."""

    def __init__(
        self,
        config: RouterConfig,
        engines: Collection[EngineClient],
        others: Others | None = None,
        look: Look | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.config = config
        self.engines = engines
        self._others = others
        self._look = look
        self.stats = RouterStats()
        self.draining = False
        self.body_bytes = 0  # of request bodies that are not complete
        self.balancer = Balancer()
        self._model: ServedModel | None = None
        self._loading = asyncio.Lock()
        self._heavy = ThreadPoolExecutor(HEAVY_THREADS, "manta-heavy")
        self._renderer = Renderer()
        self._rendering = ThreadPoolExecutor(1, "manta-rendering")
        self._watching: asyncio.Task[None] | None = None
        self._missing_since: float | None = None  # when it was first seen that none is there

    # ---- the engines ----

    async def reachable(self) -> list[EngineClient]:
        """The engines that make progress: those that admit requests, or else those that drain.

        If none admits, it looks around first: without that, an engine that one ingress process has
        found already, and has called healthy, would not be there for another.
        """
        if not self._admitting() and self._look is not None:
            await self._look()
        found = self._admitting() or [engine for engine in self.engines if engine.healthy]
        if found:
            self._missing_since = None
        return found

    def retry_after(self) -> int:
        """Seconds after which a request that cannot be served now should come again.

        1 if an engine admits requests or all drain; else what is left of the time until one that
        has died is replaced.
        """
        now = time.monotonic()
        if any(engine.healthy for engine in self.engines):
            self._missing_since = None
            return 1
        if self._missing_since is None:
            self._missing_since = now
        start = self._model.info.start_seconds if self._model is not None else 0.0
        left = start + REPLACING - (now - self._missing_since)
        return max(1, min(MOST_RETRY_AFTER, math.ceil(left)))

    def _admitting(self) -> list[EngineClient]:
        return [engine for engine in self.engines if engine.healthy and engine.load.admits]

    # ---- the model ----

    async def model(self, name: str | None = None) -> ServedModel:
        """The model, under the name that a request gives.

        Raises ApiError 404 for another name, Unavailable while no engine is there.
        """
        model = self._model
        if model is None or not any(map(model.fits, self._admitting())):
            model = await self._load()
        if name is not None and name not in model.names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; there is {', '.join(model.names)}",
                param="model",
                code="model_not_found",
            )
        return model

    async def _load(self) -> ServedModel:
        async with self._loading:
            engines = await self.reachable()
            model = self._model
            if model is not None and (not engines or any(map(model.fits, engines))):
                return model
            if not engines:
                raise Unavailable("no engine is ready yet", "starting")
            self._model = await asyncio.to_thread(self._resolve, engines[0].info)
            return self._model

    def _resolve(self, info: EngineInfo) -> ServedModel:
        names = self.config.served_model_name or (info.model,)
        facts = (info.model, info.revision, info.max_model_len, info.vocab_size, info.block_size)
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        template = info.chat_template
        tokenizer = Tokenizer.load(info.tokenizer, info.revision, info.chat_options)
        tokenizer.renderer = self._renderer.render
        self._renderer.start()
        return ServedModel(
            info,
            tokenizer,
            None if template is None else load_template(template),
            names,
            f"fp_{digest}",
            int(time.time()),
        )

    # ---- requests ----

    def check_admission(self) -> None:
        """Raises Unavailable while draining."""
        if self.draining:
            raise _draining()

    async def check_drain(self) -> None:
        """Raises Unavailable if no engine will admit a request that is yet to be complete."""
        self.check_admission()
        engines = await self.reachable()
        if engines and all(engine.load.draining for engine in engines):
            raise _draining()

    async def off_loop(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what takes more than some milliseconds in a thread, as other requests wait for the
        event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._heavy, partial(call, *args, **kwargs))

    async def rendered(self, render: Callable[[], str]) -> str:
        """What ``render`` makes with a chat template, which the event loop does not wait for."""
        with self.stats.time("template"):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._rendering, render)

    async def encode(
        self, model: ServedModel, texts: list[str], special: bool, most: int, param: str
    ) -> list[list[int]]:
        """The token ids of texts.

        special: add special tokens. most: tokens that each may have; more of them may come back,
        but what has far more is refused by its size: ApiError context_length_exceeded, which
        blames ``param``.
        """
        tokenizer = model.tokenizer

        def encode() -> list[list[int]]:
            _refuse_far_longer(tokenizer, texts, most, param)
            return tokenizer.encode(texts, special)

        return await self._tokenized(sum(map(len, texts)), encode)

    async def encode_chat(
        self, model: ServedModel, text: str, special: bool, most: int
    ) -> tuple[str, list[int]]:
        """A rendered chat, as it is shown and as token ids; see ``encode``."""
        tokenizer = model.tokenizer

        def encode() -> tuple[str, list[int]]:
            _refuse_far_longer(tokenizer, [text], most, "messages")
            return tokenizer.encode_chat(text, special)

        return await self._tokenized(len(text), encode)

    async def bad_words(
        self, model: ServedModel, sampling: SamplingParams
    ) -> tuple[tuple[int, ...], ...]:
        """The token sequences of ``sampling.bad_words``."""
        words, tokenizer = sampling.bad_words or (), model.tokenizer
        if sum(map(len, words)) <= INLINE_CHARACTERS:
            return tuple(map(tuple, tokenizer.bad_words_ids(words)))
        return tuple(map(tuple, await self.off_loop(tokenizer.bad_words_ids, words)))

    async def _tokenized(self, size: int, encode: Callable[[], T]) -> T:
        """What ``encode`` gives; long texts do not hold up the other requests' streams."""
        with self.stats.time("tokenize"):
            return encode() if size <= INLINE_CHARACTERS else await self.off_loop(encode)

    @contextlib.asynccontextmanager
    async def generations(
        self,
        model: ServedModel,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        priority: int,
        streaming: bool,
        client: str = "",
        pools: bool = False,
    ) -> AsyncIterator[list[Generation]]:
        """The prompts' generations, all queued; none outlives the block. ``client`` asks for them.
        ``pools``: they become vectors, which the outputs have.

        Raises RequestError (QueueFull, PromptTooLong) and EngineError.
        """
        bad_words = await self.bad_words(model, sampling)
        started: list[Generation] = []

        async def start(number: int, prompt: Prompt) -> None:
            request = begin(
                uuid.uuid4().hex,
                prompt.ids,
                sampling,
                bad_words=bad_words,
                priority=priority,
                client=client,
                pools=pools,
                timeout=self.config.request_timeout,
            )
            route = _Route(self, model)
            stream = await Stream(request, route, model.info.failover).start()
            text = Collector(request, prompt.text, model.tokenizer, stream.metrics, streaming)
            first = number * sampling.n
            started.append(Generation(text, stream, first, sampling, model.names[0]))

        try:
            await settled(start(number, prompt) for number, prompt in enumerate(prompts))
            yield sorted(started, key=lambda generation: generation.first_choice)
        finally:
            for generation in started:
                generation.end()
            self._observe(started)

    async def admitting(self, model: ServedModel, seconds: float) -> bool:
        """Whether an engine takes requests for a model: as soon as one does, or after so many
        seconds not."""
        deadline = time.monotonic() + seconds
        while not any(map(model.fits, self._admitting())):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._watching is None or self._watching.done():  # one looks for all who wait
                self._watching = asyncio.create_task(self._watch())
            await asyncio.wait((self._watching,), timeout=left)
        return True

    async def _watch(self) -> None:
        await self.reachable()
        if not self._admitting():
            await asyncio.sleep(WATCH_EVERY)

    async def admit(
        self, model: ServedModel, request: Continuation, sink: Sink, look: bool
    ) -> Attempt:
        """Queue a request with the engine that suits it, or the next if that one will not.

        ``look``: whether to look around, if no engine takes requests. Raises RequestError and
        EngineError; Unavailable if none does.
        """
        engines = await self.reachable() if look else []
        refusal: Exception = Unavailable("no engine is ready yet", "starting")
        if any(engine.load.draining for engine in engines):
            refusal = _draining()
        elif any(engine.load.recovering for engine in engines):
            refusal = Unavailable("the engine's workers are started again", "starting")
        tried: set[str] = set()
        while True:
            candidates = [
                engine
                for engine in self._admitting()
                if model.fits(engine) and engine.info.engine_id not in tried
            ]
            if not candidates:
                raise refusal
            known = sum(map(len, filter(None, request.outputs)))
            ticket = self.balancer.choose(
                request.prompt_token_ids, len(request.unfinished), candidates, known
            )
            tried.add(ticket.client.info.engine_id)
            patience = ADMISSION_PATIENCE if len(candidates) > 1 else None
            try:
                async with asyncio.timeout(patience):
                    attempt = await ticket.client.submit(request, sink)
                attempt.place = ticket
                attempt.stay.engine = ticket.client.info.engine_id
                return attempt
            except TimeoutError:  # it may hang; submit has taken the request back
                ticket.ended()
            except QueueFull as error:
                ticket.ended()
                refusal = error
            except EngineError as error:
                ticket.ended()
                if not isinstance(refusal, QueueFull):
                    refusal = error
            except BaseException:
                ticket.ended()
                raise

    # ---- metrics ----

    def metrics(self) -> list[Metric]:
        """What this process has counted."""
        return [*self.stats.metrics(), engines_metric(self.engines)]

    async def sources(self) -> Sources:
        """The metrics of the whole application."""
        ingress = {} if self._others is None else dict(await self._others())
        ingress[self.id] = self.metrics()
        served = self.config.served_model_name
        engines = list(engines_by_id(self.engines))
        return await collect(engines, served[0] if served else None, ingress)

    async def scrape(self, names: str) -> bytes:
        """The whole application's metrics as Prometheus text; ``names`` as in router/metrics.py."""
        return render(await self.sources(), names)

    def _observe(self, generations: list[Generation]) -> None:
        for generation in generations:
            metrics = generation.output.metrics
            if (queued := metrics.time_in_queue) is not None:
                self.stats.observe("queue", queued)
            if (first := metrics.time_to_first_token) is not None:
                self.stats.observe("first_token", first)


def _refuse_far_longer(tokenizer: Tokenizer, texts: list[str], most: int, param: str) -> None:
    for text in texts:
        if tokenizer.surely_longer(text, most):
            raise too_long(most, f"{len(text)} characters, which are more tokens than that", param)


def _draining() -> Unavailable:
    return Unavailable("the server is shutting down", "draining")


@dataclass(frozen=True)
class _Route:
    """To the engines of one model."""

    service: Service
    model: ServedModel

    async def ready(self, seconds: float) -> bool:
        return await self.service.admitting(self.model, seconds)

    async def admit(self, request: Continuation, sink: Sink, leaving: bool = False) -> Attempt:
        return await self.service.admit(self.model, request, sink, look=not leaving)

    def moved(self, cause: str, seconds: float) -> None:
        self.service.stats.moved(cause, seconds)
