"""``LLM``: offline batched inference in this process."""

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.interrupts import interrupts_held
from cluster.progress import PromptBar
from cluster.prompts import (
    Message,
    Prompt,
    Tokenized,
    chat_prompts,
    checked_priority,
    one_for_each,
    refuse_arguments,
    requests_of,
    text_prompts,
)
from cluster.replica import default_sampling, engine_config, open_checkpoint, start_replica
from cluster.vectors import pair_prompt, pair_template, paired, pooled, pooling_requests
from engine.chat import load_template
from engine.collector import Collector
from engine.config import EMBEDDED_MODEL
from engine.continuation import Continuation
from engine.errors import EngineError, RequestError
from engine.grammar_trial import trial_of
from engine.log import get_logger
from engine.outputs import RequestOutput
from engine.parsing.formats import AUTO, NONE, answer_format
from engine.pooling import (
    EmbeddingOutput,
    PoolingParams,
    PoolingRequestOutput,
    ScoringOutput,
    Vector,
)
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from engine.tokenizer_files import load_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger("llm")

T = TypeVar("T")


class LLM:
    """A model, ready to complete prompts. Results are in the order of the prompts.

    ``model`` is a checkpoint folder, a Hugging Face hub id, or (by default) the small chat model
    that ships inside the package. ``options`` are those of ``manta generate --help`` with
    underscores, e.g. ``dtype="auto"``, ``max_model_len=2048``.

    Raises ConfigError for a wrong option and CheckpointError for an unusable checkpoint.
    """

    def __init__(self, model: str | PathLike[str] = EMBEDDED_MODEL, **options: Any) -> None:
        started = time.perf_counter()
        self.config = engine_config(model=model, **options)
        options_ = self.config.model
        checkpoint = open_checkpoint(self.config)
        self._defaults = (
            default_sampling(checkpoint)
            if options_.generation_config == "auto"
            else SamplingParams()
        )
        self._tokenizer_path = options_.tokenizer or checkpoint.path
        self.tokenizer = Tokenizer.load(self._tokenizer_path, options_.revision, options_.chat)
        template = options_.chat_template
        self._chat_template = None if template is None else load_template(template)
        shown = self.tokenizer.chat_template(self._chat_template, with_tools=False)
        self._form = answer_format(NONE, AUTO, shown or "", False)
        self.engine = start_replica(self.config, checkpoint, self.tokenizer)
        self._trial = trial_of(
            str(self._tokenizer_path), options_.revision, self.engine.facts.vocab_size
        )
        self._request_ids = itertools.count()
        self._random = random.Random(self.config.model.seed)  # for requests that bring no seed
        log.info("Ready in %.2f s", time.perf_counter() - started)

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """transformers' tokenizer of the model, for programs that know it; loaded when it is first
        asked for. ``tokenizer`` is manta's own, which makes the same tokens.

        Raises CheckpointError if transformers cannot load it.
        """
        return self._transformers_tokenizer

    @cached_property
    def _transformers_tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_transformers(self._tokenizer_path, self.config.model.revision)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends; vLLM's defaults otherwise. A
        copy: changing it changes no default."""
        return self._defaults.clone()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
        **vllm_arguments: Any,
    ) -> list[RequestOutput]:
        """Complete prompts: strings, token id lists, or dicts ``{"prompt": str}`` or
        ``{"prompt_token_ids": [...]}``; one or a list of them.

        ``sampling_params`` is one for all or one for each, and so is ``priority``: lower first,
        under ``scheduling_policy="priority"``. A prompt that is not finished ``timeout`` seconds
        after the call ends with what it has then: ``finish_reason`` "abort", ``stop_reason``
        "timeout". Further arguments of vLLM's (``lora_request``) may ask for nothing.

        Raises RequestError, naming the prompt and field, before anything runs if one is wrong.
        """
        refuse_arguments("generate", vllm_arguments)
        return self._run(
            text_prompts(self.tokenizer, prompts), sampling_params, use_tqdm, priority, timeout
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **vllm_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: lists of OpenAI-style messages.

        ``chat_template`` is a file or the template itself, instead of the checkpoint's (or the
        option ``chat_template``). ``chat_template_kwargs`` are further variables of the template;
        one that it does not use has no effect. The other arguments are those of ``generate``.
        Raises RequestError for messages that the template refuses.
        """
        refuse_arguments("chat", vllm_arguments)
        prompts = chat_prompts(
            self.tokenizer,
            messages,
            self._chat_template if chat_template is None else load_template(chat_template),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._run(prompts, sampling_params, use_tqdm, priority, timeout)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
        **vllm_arguments: Any,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """A vector for each prompt: ``outputs.embedding``, as the checkpoint makes it, or the
        option ``pooling``. Prompts and the other arguments are those of ``generate``.

        Raises RequestError if the model makes no embeddings, and EngineError if a prompt comes to
        none, by ``timeout`` say.
        """
        refuse_arguments("embed", vllm_arguments)
        pooling_params = self._checked_pooling(pooling_params, scores=False)
        made = text_prompts(self.tokenizer, prompts)

        def embedding(vector: Vector) -> EmbeddingOutput:
            return EmbeddingOutput(vector.tolist())

        return self._pool(made, pooling_params, embedding, use_tqdm, priority, timeout)

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
        chat_template: str | None = None,
        **vllm_arguments: Any,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How well each text of ``text_2`` goes with its one of ``text_1``, or with that one if
        there is only one: ``outputs.score``.

        The two are one prompt: as ``chat_template`` (or the option of that name) has messages of
        the roles query and document, else one after the other. Raises RequestError if the model is
        no reranker, and what ``embed`` raises.
        """
        refuse_arguments("score", vllm_arguments)
        pooling_params = self._checked_pooling(pooling_params, scores=True)
        given = self._chat_template if chat_template is None else load_template(chat_template)
        template = pair_template(self.tokenizer, given)
        made = [pair_prompt(self.tokenizer, *pair, template) for pair in paired(text_1, text_2)]

        def score(vector: Vector) -> ScoringOutput:
            return ScoringOutput(float(vector[0]))

        return self._pool(made, pooling_params, score, use_tqdm, priority, timeout)

    # ---- inside ----

    def _checked_pooling(self, params: PoolingParams | None, scores: bool) -> PoolingParams:
        facts, params = self.engine.facts, params or PoolingParams()
        params.check(facts.pooling, facts.vector_size, scores)
        return params

    def _pool(
        self,
        prompts: list[Tokenized],
        params: PoolingParams,
        make: Callable[[Vector], T],
        use_tqdm: bool,
        priority: int | Sequence[int] | None,
        timeout: float | None,
    ) -> list[PoolingRequestOutput[T]]:
        policy, pooling = self.config.scheduler.scheduling_policy, self.engine.facts.pooling
        assert pooling is not None
        priority = checked_priority(priority, policy, len(prompts))
        requests = pooling_requests(prompts, priority, timeout, map(str, self._request_ids))
        outputs = self._complete(requests, prompts, use_tqdm)
        return [
            PoolingRequestOutput(
                output.request_id,
                make(pooled(pooling, params, output)),
                output.prompt_token_ids,
                output.num_cached_tokens,
            )
            for output in outputs
        ]

    def _run(
        self,
        prompts: list[Tokenized],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: int | Sequence[int] | None,
        timeout: float | None,
    ) -> list[RequestOutput]:
        params = one_for_each(sampling_params, self._defaults, len(prompts))
        priority = checked_priority(priority, self.config.scheduler.scheduling_policy, len(prompts))
        ids = map(str, self._request_ids)
        requests = requests_of(
            self.tokenizer, self._form, prompts, params, priority, timeout, ids, self._random
        )
        return self._complete(requests, prompts, use_tqdm)

    def _complete(
        self, requests: list[Continuation], prompts: list[Tokenized], use_tqdm: bool
    ) -> list[RequestOutput]:
        collectors: dict[str, Collector] = {}
        with interrupts_held() as check_interrupt:
            try:
                for number, request in enumerate(requests):
                    try:
                        if request.sampling.structured_outputs is not None:
                            self._trial.check(request.sampling.structured_outputs)
                        metrics = self.engine.add(request)
                    except RequestError as error:
                        raise type(error)(f"prompt {number}: {error}") from None
                    text, id = prompts[number][0], request.request_id
                    collectors[id] = Collector(request, text, self.tokenizer, metrics)
                    check_interrupt()
                with PromptBar(len(prompts), use_tqdm) as bar:
                    self._drive(collectors, bar, check_interrupt)
            finally:  # a wrong prompt, an interrupt: nothing of this call goes on
                for id in collectors:
                    self.engine.abort(id)
        return [collector.output for collector in collectors.values()]

    def _drive(
        self, collectors: dict[str, Collector], bar: PromptBar, check_interrupt: Callable[[], None]
    ) -> None:
        unfinished = len(collectors)
        while unfinished:
            check_interrupt()
            for id, outcome in self.engine.step():
                collector = collectors[id]
                taken = collector.take([outcome], partial(self.engine.stop_at_text, id))
                if taken and collector.output.finished:
                    unfinished -= 1
                    bar.finished(collector.output)
            if unfinished and not self.engine.has_work:
                raise EngineError(f"{unfinished} requests are unfinished but nothing can run")
