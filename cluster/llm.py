"""``LLM``: offline batched inference in this process."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from cluster.interrupts import interrupts_held
from cluster.progress import PromptBar
from cluster.prompts import (
    Message,
    Prompt,
    chat_prompts,
    checked_priority,
    one_for_each,
    text_prompts,
)
from cluster.replica import default_sampling, open_checkpoint, start_replica
from engine.chat import load_template
from engine.config import EMBEDDED_MODEL, EngineConfig
from engine.errors import EngineError, RequestError
from engine.log import get_logger
from engine.output import RequestText
from engine.outputs import RequestOutput
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

log = get_logger("llm")


class LLM:
    """A model, ready to complete prompts. Results are in the order of the prompts.

    ``model`` is a checkpoint folder, a Hugging Face hub id, or (by default) the small chat model
    that ships inside the package. ``options`` are those of ``manta generate --help`` with
    underscores, e.g. ``dtype="auto"``, ``max_model_len=2048``.

    Raises ConfigError for a wrong option and CheckpointError for an unusable checkpoint.
    """

    def __init__(self, model: str | PathLike[str] = EMBEDDED_MODEL, **options: Any) -> None:
        started = time.perf_counter()
        self.config = EngineConfig.from_options(model=model, **options)
        options_ = self.config.model
        checkpoint = open_checkpoint(self.config)
        self._defaults = (
            default_sampling(checkpoint)
            if options_.generation_config == "auto"
            else SamplingParams()
        )
        self.tokenizer = Tokenizer.load(
            options_.tokenizer or checkpoint.path, options_.revision, options_.chat
        )
        template = options_.chat_template
        self._chat_template = None if template is None else load_template(template)
        self.engine = start_replica(self.config, checkpoint, self.tokenizer)
        self._request_ids = itertools.count()
        log.info("Ready in %.2f s", time.perf_counter() - started)

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends; vLLM's defaults otherwise."""
        return self._defaults

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts: strings, token id lists, or dicts ``{"prompt": str}`` or
        ``{"prompt_token_ids": [...]}``; one or a list of them.

        ``sampling_params`` is one for all or one for each. ``priority`` is one for each prompt,
        lower first, under ``scheduling_policy="priority"``. A prompt that is not finished
        ``timeout`` seconds after the call ends with what it has then: ``finish_reason`` "abort",
        ``stop_reason`` "timeout".

        Raises RequestError, naming the prompt and field, before anything runs if one is wrong.
        """
        return self._run(
            text_prompts(self.tokenizer, prompts), sampling_params, use_tqdm, priority, timeout
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        timeout: float | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: lists of OpenAI-style messages.

        ``chat_template`` is a file or the template itself, instead of the checkpoint's (or the
        option ``chat_template``); ``timeout`` is that of ``generate``. Raises RequestError for
        messages that the template refuses.
        """
        prompts = chat_prompts(
            self.tokenizer,
            messages,
            self._chat_template if chat_template is None else load_template(chat_template),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        return self._run(prompts, sampling_params, use_tqdm, None, timeout)

    # ---- inside ----

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None,
        timeout: float | None,
    ) -> list[RequestOutput]:
        defaults = self.get_default_sampling_params()
        params = one_for_each(sampling_params, defaults, len(prompts))
        priority = checked_priority(priority, self.config.scheduler.scheduling_policy, len(prompts))
        texts: dict[str, RequestText] = {}
        with interrupts_held() as check_interrupt:
            try:
                for number, (text, ids) in enumerate(prompts):
                    try:
                        request = self._request(ids, params[number], priority[number], timeout)
                        metrics = self.engine.add(request)
                    except RequestError as error:
                        raise type(error)(f"prompt {number}: {error}") from None
                    texts[request.request_id] = RequestText(request, text, self.tokenizer, metrics)
                    check_interrupt()
                with PromptBar(len(prompts), use_tqdm) as bar:
                    self._drive(texts, bar, check_interrupt)
            finally:  # a wrong prompt, an interrupt: nothing of this call goes on
                for request_id in texts:
                    self.engine.abort(request_id)
        return [text.output for text in texts.values()]

    def _request(
        self, ids: list[int], sampling: SamplingParams, priority: int, timeout: float | None
    ) -> Request:
        return Request(
            request_id=str(next(self._request_ids)),
            prompt_token_ids=ids,
            sampling=sampling,
            bad_words=tuple(map(tuple, self.tokenizer.bad_words_ids(sampling.bad_words))),
            priority=priority,
            timeout=timeout,
        )

    def _drive(
        self, texts: dict[str, RequestText], bar: PromptBar, check_interrupt: Callable[[], None]
    ) -> None:
        unfinished = len(texts)
        while unfinished:
            check_interrupt()
            for delta in self.engine.step():
                text = texts[delta.request_id]
                _, stopped = text.take(delta)
                if stopped is not None:
                    self.engine.stop_at_text(delta.request_id, delta.index)
                if text.output.finished:
                    unfinished -= 1
                    bar.finished(text.output)
            if unfinished and not self.engine.has_work:
                raise EngineError(f"{unfinished} requests are unfinished but nothing can run")
