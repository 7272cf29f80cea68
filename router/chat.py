"""POST /v1/chat/completions, and the way from messages to a prompt."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from engine.chat import check_variables
from engine.errors import RequestError
from engine.outputs import CompletionOutput, Piece
from engine.parsing.answers import thinking_budget
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from engine.thinking import ThinkingBudget
from router.answers import CALLING, ChunkedAnswer, check, to_json
from router.errors import ApiError, field_of, wrong
from router.generation import Generation, Prompt
from router.logprobs import chat_logprobs, prompt_logprobs
from router.models import ServedModel
from router.parameters import refuse_contradictions, room_for_output, sampling_of
from router.parsing import ChoiceStream, Parsing, form_of, parsing_of, whole_message
from router.schema import ChatRequest, TokenizeRequest
from router.service import Service
from router.shapes import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from router.structured import check_outputs, outputs_of
from router.structured_calls import in_answers
from router.tools import tool_use


@dataclass(frozen=True)
class ChatRun:
    """A chat that can be run. ``parsing`` is None if the answer is text and no more."""

    model: ServedModel
    prompt: Prompt
    sampling: SamplingParams
    parsing: Parsing | None


async def answer_chat(service: Service, body: ChatRequest) -> "ChatAnswer":
    """The answer to come, of a request that can be served.

    Raises ApiError and RequestError, naming what is wrong.
    """
    return ChatAnswer(service, body, await run_of(service, body))


async def run_of(service: Service, body: ChatRequest, fits: bool = False) -> ChatRun:
    """What is to be run for a chat. fits: bounds are made to fit, not refused: of an output that is
    longer than there is room for, and of thinking where a model has none.

    Raises ApiError and RequestError, naming what is wrong.
    """
    model = await service.model(body.model)
    refuse_contradictions(body, model.info)
    if body.top_logprobs and not body.logprobs:
        raise wrong("top_logprobs needs logprobs to be true", "top_logprobs")
    parsing, outputs, prompt = await _begun(service, model, body, model.info.max_model_len)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    room = room_for_output(model.info, len(prompt.ids), None if fits else asked, "messages")
    if asked is None:
        asked = model.info.recommended_max_tokens or room
    sampling = sampling_of(
        body,
        model.info.default_sampling,
        max_tokens=min(asked, room),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        structured_outputs=outputs,
        thinking_token_budget=body.thinking_token_budget,
        **({"skip_special_tokens": False} if parsing and parsing.shows_special else {}),
    )
    if (most := sampling.thinking_token_budget) is not None:
        goes_on = bool(body.continue_final_message)
        prompt.thinking = _bounded(parsing, most, goes_on, fits)
    return ChatRun(model, prompt, sampling, parsing)


def _bounded(
    parsing: Parsing | None, most: int, goes_on: bool, fits: bool
) -> ThinkingBudget | None:
    """A bound on the thinking of answers; None if there will be none. goes_on, fits: see
    ``in_answers`` and ``run_of``. Raises RequestError."""
    form = parsing.form if parsing else None
    if fits and not (form and form.thoughts):
        return None
    budget = thinking_budget(form, most, bool(parsing and parsing.opened))
    begins = parsing is not None and not parsing.prefix and (parsing.opened or not goes_on)
    return budget if begins else None


async def length_of(service: Service, body: ChatRequest, most: int) -> int:
    """How many tokens a chat's prompt has; see ``Service.encode`` for ``most``.

    Raises ApiError and RequestError, naming what is wrong.
    """
    model = await service.model(body.model)
    _, _, prompt = await _begun(service, model, body, max(most, model.info.max_model_len))
    return len(prompt.ids)


async def _begun(
    service: Service, model: ServedModel, body: ChatRequest, most: int
) -> tuple[Parsing | None, StructuredOutputsParams | None, Prompt]:
    """How the answers are taken apart, what they must match, and the prompt that begins them."""
    use = tool_use(body)
    form = form_of(model, _template(service, model, body.chat_template), use)
    text = await _rendered(service, model, body, use.tools)
    final = last_text(body) if body.continue_final_message else ""
    outputs, parsing = outputs_of(body), None
    await check_outputs(model, body, outputs)
    if form is not None:
        opened = form.opened_by(text, final)
        plain, outputs = outputs, await in_answers(model, form, use, opened, bool(final), outputs)
        parsing = parsing_of(form, model, use, opened, outputs is not plain, body)
        text += parsing.prefix
    return parsing, outputs, await _encoded(service, model, body, text, most)


def last_text(body: ChatRequest) -> str:
    """The text of the last message."""
    content = body.messages[-1].get("content") or ""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return "\n".join(parts)


async def render(
    service: Service, model: ServedModel, body: ChatRequest | TokenizeRequest, most: int
) -> Prompt:
    """The prompt that the chat template makes of the messages; see ``Service.encode`` for ``most``.

    Raises RequestError for wrong messages, ApiError 422 for what the template refuses.
    """
    text = await _rendered(service, model, body, body.tools or ())
    return await _encoded(service, model, body, text, most)


async def _rendered(
    service: Service,
    model: ServedModel,
    body: ChatRequest | TokenizeRequest,
    tools: Sequence[Mapping[str, Any]],
) -> str:
    messages: list[dict[str, Any]] = body.messages or []
    template = _template(service, model, body.chat_template)
    goes_on = bool(body.continue_final_message)
    generation = body.add_generation_prompt
    variables = dict(check_variables(body.chat_template_kwargs or {}))
    if body.documents:
        variables["documents"] = body.documents
    if isinstance(body, ChatRequest) and body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":  # as the templates of Qwen, GLM and DeepSeek name it
            variables.setdefault("enable_thinking", False)
            variables.setdefault("thinking", False)

    def rendered() -> str:
        return model.tokenizer.render_chat(
            messages,
            template,
            add_generation_prompt=not goes_on if generation is None else generation,
            continue_final_message=goes_on,
            tools=tools or None,
            **variables,
        )

    with refused_by_template():
        return await service.rendered(rendered)


@contextlib.contextmanager
def refused_by_template() -> Iterator[None]:
    """What the chat template refuses is ApiError 422; other RequestErrors stay what they are."""
    try:
        yield
    except RequestError as error:
        if "chat template" in str(error):  # nothing is wrong with them but for this model
            param = field_of(str(error)) or "messages"
            raise ApiError(422, str(error), param=param, code="unprocessable") from None
        raise


async def _encoded(
    service: Service,
    model: ServedModel,
    body: ChatRequest | TokenizeRequest,
    text: str,
    most: int,
) -> Prompt:
    special = bool(body.add_special_tokens)
    text, ids = await service.encode_chat(model, text, special, most)
    return Prompt(ids, text)


def _template(service: Service, model: ServedModel, asked: str | None) -> str | None:
    if asked is None:
        return model.chat_template
    trusted = service.config.trust_request_chat_template
    if not trusted and asked not in model.tokenizer.chat_templates:
        names = ", ".join(sorted(model.tokenizer.chat_templates)) or "none"
        raise wrong(
            "chat_template: this server takes no templates from requests"
            f" (--trust-request-chat-template); the checkpoint's own are: {names}",
            "chat_template",
        )
    return asked


class ChatAnswer(ChunkedAnswer):
    """Answers to a chat, whole or as a stream."""

    prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        run: ChatRun,
    ) -> None:
        super().__init__(service, run.model, body, [run.prompt], run.sampling)
        last = body.messages[-1]
        goes_on = body.continue_final_message or body.add_generation_prompt is False
        self._role: str = last["role"] if goes_on else "assistant"
        self._echoed = last_text(body) if body.echo and last["role"] == self._role else ""
        self._parsing = run.parsing
        self.alive = CALLING if run.parsing else b""
        self._streams: dict[int, ChoiceStream] = {}  # of the choices of a stream that is parsed

    def whole(self, generations: list[Generation]) -> bytes:
        (generation,) = generations
        output = generation.output
        answer = ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.name,
            system_fingerprint=self.model.fingerprint,
            choices=[self._choice(generation, index) for index in range(len(output.outputs))],
            usage=self.usage(generations),
            prompt_token_ids=output.prompt_token_ids if self.return_ids else None,
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
        )
        return to_json(answer)

    def _choice(self, generation: Generation, index: int) -> ChatChoice:
        output = generation.output.outputs[index]
        check(output)
        message, reason = ChatMessage(self._role, output.text), output.finish_reason
        if self._parsing is not None:
            message, reason = whole_message(self._parsing, self._role, output)
        if self._echoed:
            message.content = self._echoed + (message.content or "")
        return ChatChoice(
            index=index,
            message=message,
            logprobs=self._shown(output, output.token_ids),
            finish_reason=reason,  # type: ignore[arg-type]
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if self.return_ids else None,
        )

    def _shown(self, output: CompletionOutput, token_ids: list[int]) -> ChatLogprobs | None:
        """Those of the last tokens of an output."""
        count = self.sampling.logprobs
        if count is None:
            return None
        assert output.logprobs is not None
        positions = output.logprobs[len(output.logprobs) - len(token_ids) :]
        return chat_logprobs(token_ids, positions, count, self.model.tokenizer, self.as_ids)

    def _opening(self, generation: Generation, choice: int) -> bytes:
        part = to_json(ChatChunkChoice(index=choice, delta=ChatDelta(self._role, "")))
        tail = self._usage_or_tail(generation)
        if self.return_ids:
            ids = to_json(generation.output.prompt_token_ids)
            tail = b'],"prompt_token_ids":' + ids + tail[1:]
        data = self._head + part + tail
        if self._echoed:
            data += self._head + _content(choice, self._echoed) + self._tail
        return data

    def _plain(self, choice: int, text: str) -> bytes:
        if self._parsing is None:
            return _content(choice, text)
        delta = self._stream(choice).push(text)
        return b"" if delta is None else to_json(ChatChunkChoice(index=choice, delta=delta))

    def _stream(self, choice: int) -> ChoiceStream:
        assert self._parsing is not None
        if choice not in self._streams:
            self._streams[choice] = ChoiceStream(self._parsing)
        return self._streams[choice]

    def _full(self, generation: Generation, piece: Piece, choice: int) -> bytes:
        output = generation.output.outputs[piece.index]
        finished, reason = piece.finish_reason is not None, piece.finish_reason
        if self._parsing is None:
            delta = ChatDelta(content=piece.text) if piece.text or not finished else ChatDelta()
        else:
            delta, reason = self._stream(choice).last(piece.text, reason)
        part = ChatChunkChoice(
            index=choice,
            delta=delta,
            logprobs=self._shown(output, piece.token_ids),
            finish_reason=reason,  # type: ignore[arg-type]
            stop_reason=output.stop_reason if finished else UNSET,
            token_ids=piece.token_ids if self.return_ids else UNSET,
        )
        return to_json(part)


def _content(choice: int, text: str) -> bytes:
    return b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}' % (
        choice,
        to_json(text),
    )
