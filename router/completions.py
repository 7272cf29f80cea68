"""POST /v1/completions."""

from collections.abc import Sequence

from engine.outputs import CompletionOutput, Piece, PositionLogprobs
from engine.sampling_params import SamplingParams
from engine.text import detokenizer
from engine.tokenizer import Tokenizer
from router.answers import ChunkedAnswer, check, to_json
from router.errors import wrong
from router.generation import Generation, Prompt
from router.logprobs import completion_logprobs, prompt_logprobs
from router.models import ServedModel
from router.offsets import TextOffsets
from router.parameters import refuse_contradictions, room_for_output, sampling_of
from router.prompts import read_prompts
from router.schema import MOST_PROMPTS, CompletionRequest
from router.service import Service
from router.shapes import Completion, CompletionChoice, CompletionLogprobs
from router.structured import check_outputs, outputs_of

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def answer_completion(service: Service, body: CompletionRequest) -> "CompletionAnswer":
    """The answer to come, of a request that can be served.

    Raises ApiError and RequestError, naming what is wrong.
    """
    model = await service.model(body.model)
    refuse_contradictions(body, model.info)
    if body.max_tokens == 0 and not body.echo:
        raise wrong("max_tokens must be at least 1, but with echo", "max_tokens")
    prompts = await read_prompts(service, model, body.prompt, body.add_special_tokens, "prompt")
    room = min(room_for_output(model.info, len(p.ids), body.max_tokens, "prompt") for p in prompts)
    if len(prompts) * body.choices > MOST_PROMPTS:
        raise wrong(f"n: prompts and n may ask for at most {MOST_PROMPTS} choices together", "n")
    if body.echo:
        for prompt in prompts:
            if prompt.text is None:
                prompt.text = _echoed(model.tokenizer, prompt.ids, alone=body.max_tokens == 0)
    asked = body.max_tokens
    if asked is None:
        recommended = model.info.recommended_max_tokens or DEFAULT_MAX_TOKENS
        asked = min(DEFAULT_MAX_TOKENS, recommended, room)
    shown = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        shown = body.logprobs if shown is None else max(shown, body.logprobs)
    sampling = sampling_of(
        body,
        model.info.default_sampling,
        max_tokens=max(asked, 1),
        logprobs=body.logprobs,
        prompt_logprobs=shown,
        structured_outputs=outputs_of(body),
    )
    await check_outputs(model, body, sampling.structured_outputs)
    return CompletionAnswer(service, model, body, prompts, sampling)


def _echoed(tokenizer: Tokenizer, ids: Sequence[int], alone: bool) -> str:
    """The text of a prompt's tokens. A character that they leave unfinished is shown, whole, by the
    output, unless the prompt is alone."""
    if tokenizer.backend.byte_decoder is None:
        return tokenizer.decode(ids)
    text = detokenizer(tokenizer, (), skip_special_tokens=False)
    return text.push(ids) + (text.finish() if alone else "")


class CompletionAnswer(ChunkedAnswer):
    """Completions, whole or as a stream."""

    prefix = "cmpl-"
    chunk_object = "text_completion"

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        body: CompletionRequest,
        prompts: list[Prompt],
        sampling: SamplingParams,
    ) -> None:
        super().__init__(service, model, body, prompts, sampling)
        self._echo = bool(body.echo)
        self._prompt_alone = body.max_tokens == 0
        self._logprobs = body.logprobs
        self._prompt_logprobs = body.prompt_logprobs is not None
        self._offsets: dict[int, TextOffsets] = {}  # by choice
        self._detailed = self._detailed or self._prompt_alone

    def whole(self, generations: list[Generation]) -> bytes:
        choices = [
            self._choice(generation, output)
            for generation in generations
            for output in generation.output.outputs
        ]
        return to_json(
            Completion(
                id=self.id,
                object="text_completion",
                created=self.created,
                model=self.name,
                system_fingerprint=self.model.fingerprint,
                choices=choices,
                usage=self.usage(generations),
            )
        )

    def _choice(self, generation: Generation, output: CompletionOutput) -> CompletionChoice:
        check(output)
        choice = self._part(generation, output, 0, output.text, True)
        if self._prompt_logprobs:
            assert generation.output.prompt_logprobs is not None
            choice.prompt_logprobs = prompt_logprobs(generation.output.prompt_logprobs)
        return choice

    def _part(
        self,
        generation: Generation,
        output: CompletionOutput,
        start: int,
        text: str,
        opening: bool,
    ) -> CompletionChoice:
        """A choice with the output's tokens from ``start`` on, after the prompt if it is the
        opening of an echo."""
        prompt, tokens = generation.output, output.token_ids[start:]
        finish, stop = output.finish_reason, output.stop_reason
        if self._prompt_alone:
            text, tokens, finish, stop = "", [], finish and "length", None
        echoes, shown = opening and self._echo, None
        if self._logprobs is not None:
            assert output.logprobs is not None
            positions = output.logprobs[start : start + len(tokens)]
            shown = self._shown(generation, output, tokens, positions, echoes)
        if echoes:
            text = (prompt.prompt or "") + text
        return CompletionChoice(
            index=generation.first_choice + output.index,
            text=text,
            logprobs=shown,
            finish_reason=finish,  # type: ignore[arg-type]
            stop_reason=None if finish is None else stop,
            token_ids=tokens if self.return_ids else None,
            prompt_token_ids=prompt.prompt_token_ids if self.return_ids and opening else None,
        )

    def _shown(
        self,
        generation: Generation,
        output: CompletionOutput,
        tokens: list[int],
        positions: Sequence[PositionLogprobs | None],
        echoes: bool,
    ) -> CompletionLogprobs:
        """The log-probabilities of a choice's next tokens, after those of the prompt if it is
        echoed here."""
        assert self._logprobs is not None
        tokenizer, prompt = self.model.tokenizer, generation.output
        index = generation.first_choice + output.index
        if index not in self._offsets:
            ids = prompt.prompt_token_ids
            self._offsets[index] = TextOffsets(tokenizer, self.sampling, ids)
        offsets = self._offsets[index]
        before = (prompt.prompt or "") if self._echo else ""
        begins = offsets.of_prompt(prompt.prompt_token_ids, before) if echoes else []
        end = None if output.finish_reason is None else len(before) + len(output.text)
        begins += offsets.of_output(tokens, end)
        if echoes:
            assert prompt.prompt_logprobs is not None
            tokens = [*prompt.prompt_token_ids, *tokens]
            positions = [*prompt.prompt_logprobs, *positions]
        return completion_logprobs(
            tokens, positions, self._logprobs, tokenizer, self.as_ids, begins
        )

    def _opening(self, generation: Generation, choice: int) -> bytes:
        if not self._echo or self._detailed:
            return b""  # a detailed first chunk has the prompt itself
        return self._head + self._plain(choice, generation.output.prompt or "") + self._tail

    def _plain(self, choice: int, text: str) -> bytes:
        return (
            b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null,"stop_reason":null,'
            b'"token_ids":null,"prompt_token_ids":null,"prompt_logprobs":null}'
        ) % (choice, to_json(text))

    def _full(self, generation: Generation, piece: Piece, choice: int) -> bytes:
        output = generation.output.outputs[piece.index]
        start = len(output.token_ids) - len(piece.token_ids)
        opening = self._detailed and start == 0
        part = self._part(generation, output, start, piece.text, opening)
        return to_json(part)

    def length(self, output: CompletionOutput) -> int:
        return 0 if self._prompt_alone else len(output.token_ids)
