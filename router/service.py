"""What all routes share: the engines, the models that they serve, and a request's way to one."""

import asyncio
import contextlib
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
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from cluster.attempts import Attempt
from cluster.client import EngineClient, Sink
from cluster.streams import Stream, settled
from engine.collector import Collector
from engine.continuation import Continuation, begin
from engine.errors import EngineError, QueueFull, Unavailable
from engine.sampling_params import SamplingParams
from engine.stats import Metric
from engine.tokenizer import Tokenizer
from router.balance import Balancer
from router.config import RouterConfig
from router.errors import too_long
from router.generation import Generation, Prompt
from router.metrics import Sources, collect, render
from router.models import Models, ServedModel
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


class Service:
    """The state of one ingress process. ``engines`` is live: engines come and go in it;
    ``declared`` gives the names of the models that there are to be: see ``Models``."""

    def __init__(
        self,
        config: RouterConfig,
        engines: Collection[EngineClient],
        others: Others | None = None,
        look: Look | None = None,
        declared: Callable[[], Collection[str]] | None = None,
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
        self.models = Models(self.reachable, look, declared or (lambda: ()))
        self._heavy = ThreadPoolExecutor(HEAVY_THREADS, "manta-heavy")
        self._rendering = ThreadPoolExecutor(1, "manta-rendering")
        self._watching: dict[str, asyncio.Task[None]] = {}  # by the model's id
        # When a model was first seen to have no engine, by its name; "" is for any model.
        self._missing_since: dict[str, float] = {}

    # ---- the engines ----

    async def reachable(self, name: str | None = None) -> list[EngineClient]:
        """The engines of a model, or of all, that make progress: those that admit requests, or else
        those that drain.

        If none admits, it looks around first: without that, an engine that one ingress process has
        found already, and has called healthy, would not be there for another.
        """
        if not self._admitting(name) and self._look is not None:
            await self._look()
        found = self._admitting(name) or [one for one in self._of(name) if one.healthy]
        if found and self._missing_since:
            for known in ("", *(n for engine in found for n in engine.info.names)):
                self._missing_since.pop(known, None)
        return found

    def retry_after(self, error: BaseException | None = None) -> int:
        """Seconds after which a request that cannot be served now, as ``error`` says, should come
        again.

        1 if an engine, of the model that is missing, admits requests or all drain; else what is
        left of the time until one that has died is replaced.
        """
        now = time.monotonic()
        model = error.model if isinstance(error, Unavailable) else ""
        if any(engine.healthy for engine in self._of(model or None)):
            self._missing_since.pop(model, None)
            return 1
        since = self._missing_since.setdefault(model, now)
        known = [one for one in self.models if not model or model in one.info.names]
        start = max((one.info.start_seconds for one in known), default=0.0)
        left = start + REPLACING - (now - since)
        return max(1, min(MOST_RETRY_AFTER, math.ceil(left)))

    def _of(self, name: str | None) -> list[EngineClient]:
        return [engine for engine in self.engines if name is None or name in engine.info.names]

    def _admitting(self, name: str | None) -> list[EngineClient]:
        return [engine for engine in self._of(name) if engine.healthy and engine.load.admits]

    def _takers(self, model: ServedModel) -> list[EngineClient]:
        """The engines that take requests made for a model now."""
        return [engine for engine in self._admitting(model.id) if model.fits(engine)]

    async def model(self, name: str | None = None) -> ServedModel:
        """The model of the name that a request gives; raises as ``Models.load`` does."""
        model = None if name is None else self.models.named(name)
        if model is None or not any(map(model.fits, self._admitting(name))):
            model = await self.models.load(name)
        self.stats.asked_for(model.id)
        return model

    async def served(self) -> list[ServedModel]:
        """The models that requests may be for, by id. Raises Unavailable if there is none yet."""
        if self._look is not None:
            await self._look()
        return await self.models.load_all()

    # ---- requests ----

    def check_admission(self) -> None:
        """Raises Unavailable while draining."""
        if self.draining:
            raise _draining()

    async def check_drain(self) -> None:
        """Raises Unavailable if no engine will admit a request that is yet to be complete."""
        self.check_admission()
        if any(engine.load.closing for engine in await self.reachable()):
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
                thinking=prompt.thinking,
                priority=priority,
                client=client,
                pools=pools,
                timeout=self.config.request_timeout,
            )
            route = _Route(self, model)
            stream = await Stream(request, route, model.info.failover).start()
            text = Collector(request, prompt.text, model.tokenizer, stream.metrics, streaming)
            first = number * sampling.n
            started.append(Generation(text, stream, first, sampling, model.id))

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
        while not self._takers(model):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            watching = self._watching.get(model.id)
            if watching is None or watching.done():  # one looks for all who wait
                watching = self._watching[model.id] = asyncio.create_task(self._watch(model))
            await asyncio.wait((watching,), timeout=left)
        return True

    async def _watch(self, model: ServedModel) -> None:
        await self.reachable(model.id)
        if not self._takers(model):
            await asyncio.sleep(WATCH_EVERY)

    async def admit(
        self, model: ServedModel, request: Continuation, sink: Sink, look: bool
    ) -> Attempt:
        """Queue a request with the engine that suits it, or the next if that one will not.

        ``look``: whether to look around, if no engine takes requests. Raises RequestError and
        EngineError; Unavailable if none does.
        """
        engines = await self.reachable(model.id) if look else []
        why = "no engine is ready yet"
        if any(engine.load.recovering for engine in engines):
            why = "the engine's workers are started again"
        refusal: Exception = Unavailable(why, "starting", model.id)
        if any(engine.load.closing for engine in engines):
            refusal = _draining()
        elif self.models.lacks(model.id) or self._replaced(model):
            why = f"the model {model.id!r} was removed or replaced"
            refusal = Unavailable(why, "draining", model.id)
        tried: set[str] = set()
        while True:
            candidates = [
                engine for engine in self._takers(model) if engine.info.engine_id not in tried
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
                    refusal = Unavailable(str(error), "starting", model.id)
            except BaseException:
                ticket.ended()
                raise

    def _replaced(self, model: ServedModel) -> bool:
        """Whether the engines of its name serve another by now."""
        return bool(self._admitting(model.id)) and not self._takers(model)

    # ---- metrics ----

    def metrics(self) -> list[Metric]:
        """What this process has counted."""
        models = [model.id for model in self.models]
        return [*self.stats.metrics(models), engines_metric(self.engines, models)]

    async def sources(self) -> Sources:
        """The metrics of the whole application."""
        ingress = {} if self._others is None else dict(await self._others())
        ingress[self.id] = self.metrics()
        return await collect(list(engines_by_id(self.engines)), ingress)

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
        self.service.stats.moved(self.model.id, cause, seconds)
