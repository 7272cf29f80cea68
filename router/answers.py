"""What answers have in common on the way out: whole ones and streams of events, and what those of
completions and chats have, which are chunks.

The parts of a chunk that never change in a stream are made once; a token costs an escape of its
text and a join.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

import msgspec

from cluster.loop import FEW_LOGPROBS
from engine.outcome import Outcome
from engine.outputs import CompletionOutput, Piece, RequestOutput
from engine.sampling_params import SamplingParams
from router.errors import ApiError
from router.generation import Generation, Prompt, merged
from router.models import ServedModel
from router.schema import PoolingRequest, Sampling
from router.service import Service
from router.shapes import PromptTokensDetails, Usage

SILENCE = 10.0  # seconds after which a stream that tells nothing shows that it lives
CALLING = b": a call is being written\n\n"  # a comment, which clients pass over
DONE = b"data: [DONE]\n\n"
WAITING = b": the engine was lost; the answer goes on at another as soon as there is one\n\n"
to_json = msgspec.json.Encoder().encode


class WholeAnswer(ABC):
    """One request's way out, as a ``Reply`` runs it, in one piece.

    prefix: of the id. pools: its prompts become vectors, not completions.
    """

    prefix: str
    id_headers: tuple[str, ...] = ("x-request-id",)
    pools = False

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        body: Sampling | PoolingRequest,
        prompts: list[Prompt],
        sampling: SamplingParams,
    ) -> None:
        self.service = service
        self.model = model
        self.prompts = prompts
        self.sampling = sampling
        self.priority = body.priority or 0
        self._unique = body.request_id or uuid.uuid4().hex
        self.id = self.prefix + self._unique
        self.created = int(time.time())
        self.name = body.model or model.id

    @abstractmethod
    async def complete(self, generations: list[Generation]) -> bytes:
        """The body, when it is there."""


class Answer(WholeAnswer):
    """One request's way out, whole or as a stream. A subclass gives the shapes of its API."""

    waiting = WAITING  # what a stream tells while it has no engine
    alive = b""  # what it tells where it has had nothing to tell for long

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        body: Sampling,
        prompts: list[Prompt],
        sampling: SamplingParams,
    ) -> None:
        super().__init__(service, model, body, prompts, sampling)
        self.streaming = bool(body.stream)
        # Whether what a step brings takes so long that it is made in a thread.
        self._heavy = sampling.prompt_logprobs is not None or not (
            sampling.logprobs is None or 0 <= sampling.logprobs <= FEW_LOGPROBS
        )

    # ---- the shapes ----

    @abstractmethod
    def _chunks(self, generation: Generation, pieces: list[Piece]) -> bytes:
        """The events that tell of further pieces."""

    @abstractmethod
    async def _end(self, generations: list[Generation]) -> bytes:
        """The events that end a stream."""

    @abstractmethod
    def failed(self, error: ApiError) -> bytes:
        """The events that end a stream which fails."""

    def _begin(self) -> bytes:
        """The events with which a stream begins at once."""
        return b""

    async def _take(self, generation: Generation, outcomes: list[Outcome]) -> list[Piece]:
        if not self._heavy:
            return generation.take(outcomes)
        taken = await self.service.off_loop(generation.read, outcomes)
        generation.settle(taken)
        return taken.pieces

    # ---- streams ----

    async def events(self, generations: list[Generation]) -> AsyncIterator[bytes]:
        """The stream's events, joined where several are ready at once."""
        if begin := self._begin():
            yield begin
        unfinished = sum(len(generation.output.outputs) for generation in generations)
        spent, told_at = 0.0, time.monotonic()
        async for generation, outcomes in merged(generations):
            if not outcomes:
                yield self.waiting
                continue
            started = time.monotonic()
            if self._heavy:
                pieces = await self._take(generation, outcomes)
                data = await self.service.off_loop(self._chunks, generation, pieces)
            else:
                pieces = generation.take(outcomes)
                data = self._chunks(generation, pieces)
            for piece in pieces:
                unfinished -= piece.finish_reason is not None
            if not unfinished:
                data += await self._end(generations)
            now = time.monotonic()
            spent += now - started
            if not data and now - told_at >= SILENCE:  # nothing of a long call is told yet, which
                data = self.alive  # proxies take for death
            if data:
                told_at = now
                yield data
            if not unfinished:
                break
        self.service.stats.observe("stream", spent)

    # ---- both ----

    def usage(self, generations: list[Generation]) -> Usage:
        """What the generations have taken."""
        outputs = [generation.output for generation in generations]
        return _usage(outputs, sum(self.length(c) for output in outputs for c in output.outputs))

    def length(self, output: CompletionOutput) -> int:
        """How many tokens of a completion the client gets."""
        return len(output.token_ids)


class ChunkedAnswer(Answer):
    """An answer whose stream is chunks, each of which has all that never changes in it."""

    chunk_object: str

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        body: Sampling,
        prompts: list[Prompt],
        sampling: SamplingParams,
    ) -> None:
        super().__init__(service, model, body, prompts, sampling)
        self.return_ids = bool(body.return_token_ids)
        self.as_ids = bool(body.return_tokens_as_token_ids)
        options = body.stream_options
        self._usage = bool(options and options.include_usage)
        self._usage_always = self._usage and bool(options and options.continuous_usage_stats)
        self._told: dict[int, int] = {}  # tokens of each choice that the stream has told of
        # Whether a chunk of text alone will not do.
        self._detailed = sampling.logprobs is not None or self.return_ids or self._usage_always
        self._head, self._tail = self._frame()

    @abstractmethod
    def whole(self, generations: list[Generation]) -> bytes:
        """The body of the whole answer, of finished generations."""

    @abstractmethod
    def _opening(self, generation: Generation, choice: int) -> bytes:
        """The chunk that comes before a choice's first, if one does."""

    @abstractmethod
    def _plain(self, choice: int, text: str) -> bytes:
        """A choice in a chunk with text alone; nothing if the text is held back."""

    @abstractmethod
    def _full(self, generation: Generation, piece: Piece, choice: int) -> bytes:
        """A choice in a chunk with all that was asked for."""

    async def complete(self, generations: list[Generation]) -> bytes:
        async for generation, outcomes in merged(generations):
            await self._take(generation, outcomes)
        if self.sampling.logprobs is None and self.sampling.prompt_logprobs is None:
            return self.whole(generations)
        return await self.service.off_loop(self.whole, generations)

    def _frame(self) -> tuple[bytes, bytes]:
        """What stands before and after the choices of a chunk."""
        head = to_json(
            {
                "id": self.id,
                "object": self.chunk_object,
                "created": self.created,
                "model": self.name,
                "system_fingerprint": self.model.fingerprint,
            }
        )
        tail = b'],"usage":null}\n\n' if self._usage else b"]}\n\n"
        return b"data: " + head[:-1] + b',"choices":[', tail

    def _chunks(self, generation: Generation, pieces: list[Piece]) -> bytes:
        return b"".join([self._chunk(generation, piece) for piece in pieces])

    def _chunk(self, generation: Generation, piece: Piece) -> bytes:
        output = generation.output.outputs[piece.index]
        finished = piece.finish_reason is not None
        if not piece.token_ids and not finished:
            return b""  # log-probabilities of the prompt
        choice = generation.first_choice + output.index
        opening = b""
        if choice not in self._told:
            self._told[choice] = 0
            opening = self._opening(generation, choice)
        self._told[choice] = self.length(output)
        if finished or self._detailed:
            check(output)
            full = self._full(generation, piece, choice)
            return opening + self._head + full + self._usage_or_tail(generation)
        if not piece.text:
            return opening
        plain = self._plain(choice, piece.text)
        return opening + (self._head + plain + self._tail if plain else b"")

    def _usage_or_tail(self, generation: Generation) -> bytes:
        if not self._usage_always:
            return self._tail
        output, first = generation.output, generation.first_choice
        told = sum(self._told.get(first + one.index, 0) for one in output.outputs)
        return b'],"usage":' + to_json(_usage([output], told)) + b"}\n\n"

    async def _end(self, generations: list[Generation]) -> bytes:
        if not self._usage:
            return DONE
        usage = to_json(self.usage(generations))
        return self._head + b'],"usage":' + usage + b"}\n\n" + DONE

    def failed(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n" + DONE


def _usage(outputs: list[RequestOutput], completion: int) -> Usage:
    """Of requests whose completions have so many tokens together."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached),
    )


def check(output: CompletionOutput) -> None:
    """Raises ApiError for a completion that ended with an error."""
    if output.finish_reason == "error":
        raise ApiError(
            500,
            f"the request ended with an error: {output.stop_reason}",
            type="server_error",
            code="generation_failed",
            headers={"x-should-retry": "false"},  # it would end so again
        )
