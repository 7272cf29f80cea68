"""What all routes share: the engines, the model that they serve, and a request's way to one."""

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any

from cluster.client import EngineClient, EngineInfo, RequestStream
from engine.chat import load_template
from engine.engine import Delta
from engine.errors import EngineError, QueueFull
from engine.output import RequestText
from engine.outputs import CompletionOutput
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.stats import Metric
from engine.tokenizer import Tokenizer
from router.balance import Balancer, Ticket
from router.config import RouterConfig
from router.errors import ApiError, unavailable, wrong
from router.metrics import scrape
from router.schema import Sampling
from router.stats import RouterStats

INLINE_CHARACTERS = 4096  # longer texts are made tokens in a thread, off the event loop


# Gives the metrics of other ingress processes by their ids.
Others = Callable[[], Awaitable[Mapping[str, list[Metric]]]]


@dataclass(frozen=True)
class ServedModel:
    """What the engines serve, as the routes need it."""

    info: EngineInfo
    tokenizer: Tokenizer
    chat_template: str | None
    names: tuple[str, ...]
    fingerprint: str
    created: int


@dataclass(slots=True)
class Piece:
    """What one wake-up brought for one completion. Its new tokens are those from ``start`` on."""

    output: CompletionOutput
    start: int
    text: str


class Generation:
    """One prompt on its way: its stream of tokens and the text that they make.

    ``first_choice`` is the index in the answer of the first of its completions.
    """

    def __init__(
        self, text: RequestText, stream: RequestStream, ticket: Ticket, first_choice: int
    ) -> None:
        self.stream = stream
        self.first_choice = first_choice
        self.output = text.output
        self._text = text
        self._ticket = ticket

    def take(self, deltas: list[Delta]) -> list[Piece]:
        """Take in what is ready: one piece for each completion that it belongs to."""
        self._ticket.started()
        pieces: dict[int, Piece] = {}
        for delta in deltas:
            output = self.output.outputs[delta.index]
            piece = pieces.get(delta.index)
            if piece is None:
                pieces[delta.index] = piece = Piece(output, len(output.token_ids), "")
            text, stopped = self._text.take(delta)
            piece.text += text
            if stopped is not None:
                self.stream.stop_at_text(delta.index)
        return list(pieces.values())

    def end(self) -> None:
        """Leave nothing of it behind in the engine."""
        self.stream.cancel()
        self._ticket.ended()


@dataclass
class Prompt:
    """Tokens to complete, and the text that they were."""

    ids: list[int]
    text: str | None = None


class Service:
    """The state of one ingress process. ``engines`` is live: engines come and go in it."""

    def __init__(
        self,
        config: RouterConfig,
        engines: Collection[EngineClient],
        others: Others | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.config = config
        self.engines = engines
        self._others = others
        self.stats = RouterStats()
        self.draining = False
        self.balancer = Balancer()
        self._model: ServedModel | None = None
        self._loading = asyncio.Lock()

    # ---- the model ----

    async def model(self, name: str | None = None) -> ServedModel:
        """The model, under the name that a request gives.

        Raises ApiError: 404 for another name, 503 while no engine is there.
        """
        model = self._model or await self._load()
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
            if self._model is None:
                engine = next(iter(self.engines), None)
                if engine is None:
                    raise unavailable("no engine is ready yet", "starting")
                self._model = await asyncio.to_thread(self._resolve, engine.info)
            return self._model

    def _resolve(self, info: EngineInfo) -> ServedModel:
        names = self.config.served_model_name or (info.model,)
        facts = (info.model, info.revision, info.max_model_len, info.vocab_size, info.block_size)
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        template = info.chat_template
        return ServedModel(
            info,
            Tokenizer.load(info.tokenizer, info.revision),
            None if template is None else load_template(template),
            names,
            f"fp_{digest}",
            int(time.time()),
        )

    # ---- requests ----

    def check_admission(self) -> None:
        """Raises ApiError 503 while draining."""
        if self.draining:
            raise _draining()

    async def encode(
        self, model: ServedModel, texts: list[str], add_special_tokens: bool
    ) -> list[list[int]]:
        """The token ids of texts; long ones do not hold up the other requests' streams."""
        with self.stats.time("tokenize"):
            if sum(map(len, texts)) <= INLINE_CHARACTERS:
                return model.tokenizer.encode(texts, add_special_tokens)
            return await asyncio.to_thread(model.tokenizer.encode, texts, add_special_tokens)

    @contextlib.asynccontextmanager
    async def generations(
        self,
        model: ServedModel,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        priority: int,
        streaming: bool,
    ) -> AsyncIterator[list[Generation]]:
        """The prompts' generations, all queued; none outlives the block.

        Raises RequestError (QueueFull, PromptTooLong) and EngineError.
        """
        bad_words = tuple(map(tuple, model.tokenizer.bad_words_ids(sampling.bad_words)))
        started: list[Generation] = []

        async def start(number: int, prompt: Prompt) -> None:
            request = Request(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt.ids,
                sampling=sampling,
                bad_words=bad_words,
                priority=priority,
                timeout=self.config.request_timeout,
            )
            ticket, stream = await self._submit(request)
            text = RequestText(request, prompt.text, model.tokenizer, stream.metrics, streaming)
            started.append(Generation(text, stream, ticket, number * sampling.n))

        self.stats.in_flight += 1
        try:
            starts = [start(number, prompt) for number, prompt in enumerate(prompts)]
            for result in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
            yield sorted(started, key=lambda generation: generation.first_choice)
        finally:
            self.stats.in_flight -= 1
            for generation in started:
                generation.end()
            self._observe(started)

    async def _submit(self, request: Request) -> tuple[Ticket, RequestStream]:
        """Queue a request with the engine that suits it, or the next if that one will not."""
        refusal: Exception = unavailable("no engine is ready yet", "starting")
        if any(engine.load.draining for engine in self.engines):
            refusal = _draining()
        tried: set[str] = set()
        while True:
            candidates = [
                engine
                for engine in self.engines
                if engine.healthy and not (engine.load.draining or engine.info.engine_id in tried)
            ]
            if not candidates:
                raise refusal
            n = request.sampling.n
            ticket = self.balancer.choose(request.prompt_token_ids, n, candidates)
            tried.add(ticket.client.info.engine_id)
            try:
                return ticket, await ticket.client.submit(request)
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
        return self.stats.metrics()

    async def scrape(self) -> bytes:
        """The whole application's metrics as Prometheus text."""
        ingress = {} if self._others is None else dict(await self._others())
        ingress[self.id] = self.metrics()
        names = self.config.served_model_name
        return await scrape(list(engines_by_id(self.engines)), names[0] if names else None, ingress)

    def _observe(self, generations: list[Generation]) -> None:
        for generation in generations:
            metrics = generation.output.metrics
            if (queued := metrics.time_in_queue) is not None:
                self.stats.observe("queue", queued)
            if (first := metrics.time_to_first_token) is not None:
                self.stats.observe("first_token", first)


def _draining() -> ApiError:
    return unavailable("the server is shutting down", "draining")


async def merged(
    generations: list[Generation],
) -> AsyncIterator[tuple[Generation, list[Delta]]]:
    """What is ready of several generations, as it comes."""
    if len(generations) == 1:
        async for deltas in generations[0].stream:
            yield generations[0], deltas
        return
    ready: asyncio.Queue[tuple[Generation, list[Delta] | BaseException | None]] = asyncio.Queue()

    async def read(generation: Generation) -> None:
        try:
            async for deltas in generation.stream:
                ready.put_nowait((generation, deltas))
            ready.put_nowait((generation, None))
        except Exception as error:
            ready.put_nowait((generation, error))

    readers = [asyncio.create_task(read(generation)) for generation in generations]
    try:
        unfinished = len(readers)
        while unfinished:
            generation, what = await ready.get()
            if isinstance(what, BaseException):
                raise what
            if what is None:
                unfinished -= 1
            else:
                yield generation, what
    finally:
        for reader in readers:
            reader.cancel()


def refuse_contradictions(body: Sampling, info: EngineInfo) -> None:
    """Raises ApiError for fields that are right, but not with each other or with this engine."""
    if body.stream_options is not None and not body.stream:
        raise wrong("stream_options needs stream to be true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise wrong("prompt_logprobs: a stream has none", "prompt_logprobs")
    if body.priority and info.scheduling_policy != "priority":
        raise wrong(
            "priority needs a server with --scheduling-policy priority; this one's is"
            f" {info.scheduling_policy}",
            "priority",
        )


def sampling_of(body: Sampling, defaults: SamplingParams, **own: Any) -> SamplingParams:
    """The sampling parameters of a request's common fields, and ``own`` ones.

    Raises RequestError, naming the field.
    """
    values: dict[str, Any] = dict(own)
    for name in _WITH_DEFAULTS:
        value = getattr(body, name)
        values[name] = getattr(defaults, name) if value is None else value
    for name in _WITHOUT_DEFAULTS:
        if (value := getattr(body, name)) is not None:
            values[name] = value
    return SamplingParams(**values)


_WITH_DEFAULTS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
_WITHOUT_DEFAULTS = (
    "n", "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "min_tokens", "allowed_token_ids", "bad_words", "skip_special_tokens",
    "spaces_between_special_tokens",
)  # fmt: skip


def room_for_output(model: ServedModel, prompt: Prompt, asked: int | None, param: str) -> int:
    """How many tokens the output may have: ``asked``, if they fit the model's length.

    Raises ApiError context_length_exceeded if they or the prompt do not.
    """
    length, most = len(prompt.ids), model.info.max_model_len
    if length >= most or (asked is not None and length + asked > most):
        wanted = f" and {asked} of output were asked for" if asked is not None else ""
        raise wrong(
            f"This model's maximum context length is {most} tokens. However, the {param} has"
            f" {length} tokens{wanted}. Please reduce the length of the {param} or of the output"
            " (context_length_exceeded).",  # LangChain looks for the code in the text
            param,
            "context_length_exceeded",
        )
    return most - length


def new_id(prefix: str, given: str | None) -> str:
    """The id of an answer."""
    return f"{prefix}-{given or uuid.uuid4().hex}"


def engines_by_id(engines: Collection[EngineClient]) -> Iterator[EngineClient]:
    """The engines, always in the same order."""
    return iter(sorted(engines, key=lambda engine: engine.info.engine_id))
