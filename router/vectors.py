"""POST /v1/embeddings, /v1/rerank and /v1/score: prompts that become vectors."""

import base64
from abc import abstractmethod
from functools import partial

import numpy as np

from cluster.vectors import pair_template, pair_text, paired, pooled
from engine.errors import RequestError
from engine.pooling import NO_SAMPLING, PoolingParams, Vector
from router.answers import WholeAnswer, check, to_json
from router.chat import refused_by_template
from router.errors import too_long, wrong
from router.generation import Generation, Prompt, merged
from router.models import ServedModel
from router.parameters import refuse_priority
from router.prompts import read_prompts
from router.schema import (
    MOST_PROMPTS,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from router.service import Service
from router.shapes import (
    Embedding,
    EmbeddingList,
    PromptTokensDetails,
    PromptUsage,
    Ranked,
    RankedDocument,
    Ranking,
    Score,
    ScoreList,
)

INLINE_VALUES = 1 << 13  # of an answer's vectors; more are written in a thread, off the event loop


async def answer_embedding(service: Service, body: EmbeddingRequest) -> "VectorAnswer":
    """The answer to come, of a request that can be served. Raises ApiError and RequestError."""
    model = await service.model(body.model)
    params = _params(model, body, dimensions=body.dimensions, scores=False)
    prompts = await read_prompts(service, model, body.input, body.add_special_tokens, "input")
    return EmbeddingAnswer(service, model, body, _fitting(model, prompts, "input"), params)


async def answer_rerank(service: Service, body: RerankRequest) -> "VectorAnswer":
    """See ``answer_embedding``."""
    model = await service.model(body.model)
    params = _params(model, body, dimensions=None, scores=True)
    documents = [one if isinstance(one, str) else one.text for one in body.documents]
    pairs = [(body.query, document) for document in documents]
    prompts = await _pair_prompts(service, model, pairs, "documents")
    return RankingAnswer(service, model, body, prompts, params, documents)


async def answer_score(service: Service, body: ScoreRequest) -> "VectorAnswer":
    """See ``answer_embedding``."""
    model = await service.model(body.model)
    params = _params(model, body, dimensions=None, scores=True)
    pairs = paired(body.text_1, body.text_2)
    prompts = await _pair_prompts(service, model, pairs, "text_2")
    return ScoreAnswer(service, model, body, prompts, params)


def _params(
    model: ServedModel, body: PoolingRequest, *, dimensions: int | None, scores: bool
) -> PoolingParams:
    refuse_priority(body.priority, model.info)
    params = PoolingParams(dimensions=dimensions, use_activation=body.use_activation)
    try:
        params.check(model.info.pooling, model.info.vector_size, scores)
    except RequestError as error:
        if dimensions is not None and str(error).startswith("dimensions"):
            raise
        raise wrong(str(error), "model") from None
    return params


def _fitting(model: ServedModel, prompts: list[Prompt], param: str) -> list[Prompt]:
    """The prompts, which have at least one token, fit the model's length, and are of its tokens.

    Raises ApiError, which blames ``param``.
    """
    most, size = model.info.max_model_len, model.info.vocab_size
    for prompt in prompts:
        if not prompt.ids:
            raise wrong(f"{param} must not be empty", param)
        if len(prompt.ids) > most:
            raise too_long(most, f"{len(prompt.ids)} tokens", param)
        if (highest := max(prompt.ids)) >= size:
            raise wrong(f"{param} has token id {highest}; the model's end at {size - 1}", param)
    return prompts


async def _pair_prompts(
    service: Service, model: ServedModel, pairs: list[tuple[str, str]], param: str
) -> list[Prompt]:
    """The prompts of which scores are made."""
    tokenizer, most = model.tokenizer, model.info.max_model_len
    template = pair_template(tokenizer, model.chat_template)
    if len(pairs) > MOST_PROMPTS:
        raise wrong(f"{param}: a list may have at most {MOST_PROMPTS} texts", param)
    if template is None:
        texts = [pair_text(tokenizer, *pair, None) for pair in pairs]
        prompts = [Prompt(ids) for ids in await service.encode(model, texts, True, most, param)]
    else:
        prompts = []
        for query, document in pairs:
            with refused_by_template():
                rendered = partial(pair_text, tokenizer, query, document, template)
                text = await service.rendered(rendered)
            prompts.append(Prompt((await service.encode_chat(model, text, False, most))[1]))
    return _fitting(model, prompts, param)


class VectorAnswer(WholeAnswer):
    """The vectors of several prompts. A subclass gives the shape of its API."""

    pools = True

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        body: PoolingRequest,
        prompts: list[Prompt],
        params: PoolingParams,
    ) -> None:
        super().__init__(service, model, body, prompts, NO_SAMPLING)
        self._params = params

    @abstractmethod
    def whole(self, vectors: list[Vector], usage: PromptUsage) -> bytes:
        """The body of the answer."""

    async def complete(self, generations: list[Generation]) -> bytes:
        async for generation, outcomes in merged(generations):
            generation.take(outcomes)
        if len(generations) * self.model.info.vector_size <= INLINE_VALUES:
            return self._made(generations)
        return await self.service.off_loop(self._made, generations)

    def _made(self, generations: list[Generation]) -> bytes:
        pooling = self.model.info.pooling
        assert pooling is not None
        outputs = [generation.output for generation in generations]
        for output in outputs:
            check(output.outputs[0])
        tokens = sum(len(output.prompt_token_ids) for output in outputs)
        cached = sum(output.num_cached_tokens for output in outputs)
        usage = PromptUsage(tokens, tokens, PromptTokensDetails(cached))
        return self.whole([pooled(pooling, self._params, output) for output in outputs], usage)


class EmbeddingAnswer(VectorAnswer):
    """Of /v1/embeddings."""

    prefix = "embd-"

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        body: EmbeddingRequest,
        prompts: list[Prompt],
        params: PoolingParams,
    ) -> None:
        super().__init__(service, model, body, prompts, params)
        self._base64 = body.encoding_format == "base64"

    def whole(self, vectors: list[Vector], usage: PromptUsage) -> bytes:
        data = [
            Embedding(number, "embedding", _base64(vector) if self._base64 else vector.tolist())
            for number, vector in enumerate(vectors)
        ]
        return to_json(
            EmbeddingList(
                id=self.id,
                object="list",
                created=self.created,
                model=self.name,
                data=data,
                usage=usage,
            )
        )


def _base64(vector: Vector) -> str:
    """float32, little-endian, as OpenAI has it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


class ScoreAnswer(VectorAnswer):
    """Of /v1/score."""

    prefix = "score-"

    def whole(self, vectors: list[Vector], usage: PromptUsage) -> bytes:
        data = [Score(number, "score", float(one[0])) for number, one in enumerate(vectors)]
        return to_json(
            ScoreList(
                id=self.id,
                object="list",
                created=self.created,
                model=self.name,
                data=data,
                usage=usage,
            )
        )


class RankingAnswer(VectorAnswer):
    """Of /v1/rerank: the best first."""

    prefix = "rerank-"

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        body: RerankRequest,
        prompts: list[Prompt],
        params: PoolingParams,
        documents: list[str],
    ) -> None:
        super().__init__(service, model, body, prompts, params)
        self._documents = documents
        self._most = body.top_n or len(documents)  # 0 is all, as in vLLM
        self._shown = body.return_documents is not False

    def whole(self, vectors: list[Vector], usage: PromptUsage) -> bytes:
        scores = np.array([vector[0] for vector in vectors])
        best = np.argsort(-scores, kind="stable")[: self._most].tolist()
        results = [
            Ranked(
                number,
                RankedDocument(self._documents[number]) if self._shown else None,
                float(scores[number]),
            )
            for number in best
        ]
        return to_json(Ranking(id=self.id, model=self.name, usage=usage, results=results))
