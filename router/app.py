"""The HTTP application: routes, what guards them, and their description."""

import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from cluster.client import EngineClient
from engine.errors import MantaError
from engine.tokenizer import Tokenizer
from router import shapes
from router.access import AccessLog
from router.answers import WholeAnswer
from router.bodies import receive_body
from router.chat import answer_chat, render
from router.completions import answer_completion
from router.config import RouterConfig
from router.dashboard import Dashboard, open_paths
from router.error_shapes import error_response
from router.errors import ApiError, api_error, unavailable, wrong
from router.fields import read
from router.guard import (
    OPEN_PATHS,
    Head,
    KeyGuard,
    OldHttp,
    RequestId,
    RootPath,
    Unforeseen,
    given_id,
)
from router.messages_answer import answer_messages, count_tokens
from router.messages_schema import CountRequest, MessagesRequest
from router.metrics import CONTENT_TYPE, PREFIXES
from router.models import ServedModel
from router.openapi import describe
from router.replies import Reply
from router.responses_answer import answer_responses
from router.responses_schema import ResponsesRequest
from router.schema import (
    MOST_DETOKENIZED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    Sampling,
    ScoreRequest,
    TokenizeRequest,
)
from router.service import Look, Others, Service
from router.states import engine_states
from router.stats import AnswerCounter
from router.vectors import answer_embedding, answer_rerank, answer_score


class _Body(Protocol):
    @property
    def model(self) -> str | None: ...


T = TypeVar("T", bound=_Body)
Identified = Sampling | ResponsesRequest | MessagesRequest | PoolingRequest
R = TypeVar("R", bound=Identified)
MOST_TOKENIZED = 1 << 17  # tokens that /tokenize counts, or as many as the model's length


def build_app(
    config: RouterConfig,
    engines: Collection[EngineClient],
    version: str = "unknown",
    others: Others | None = None,
    look: Look | None = None,
    declared: Callable[[], Collection[str]] | None = None,
) -> FastAPI:
    """The application over a live set of engines. ``app.state.service`` is its state;
    ``app.state.tracer_provider``, where it traces, is to be shut down after it.

    others: gives the metrics (``Service.metrics``) of the application's other ingress processes,
        by their ids.
    look: brings ``engines`` up to date, before a request is refused for want of one.
    declared: gives the names of the models that there are to be; see ``router.models.Models``.
    """
    service = Service(config, engines, others, look, declared)
    app = FastAPI(
        title="manta",
        version=version,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for kind in (ApiError, MantaError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(Unforeseen)
    if config.api_key:
        opened = {*OPEN_PATHS, *(open_paths() if config.dashboard else ())}
        app.add_middleware(KeyGuard, keys=config.api_key, open_paths=opened)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
    )
    app.add_middleware(AnswerCounter, stats=service.stats)
    app.add_middleware(RequestId)
    if config.access_log:
        app.add_middleware(AccessLog)
    if config.otlp_endpoint is not None:
        from router.tracing import Tracing, make_provider  # an optional package

        provider = app.state.tracer_provider = make_provider(
            config.otlp_endpoint, service.id, version
        )
        app.add_middleware(Tracing, tracer=provider.get_tracer("manta", version))
    app.add_middleware(OldHttp)
    if config.root_path:
        app.add_middleware(RootPath, path=config.root_path)
    app.add_middleware(Head)
    _Routes(service, version).add_to(app)
    if config.dashboard:
        Dashboard(service, version).add_to(app)
    describe(app, keys=bool(config.api_key))
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such route or method
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        return error_response(ApiError(error.status_code, message, headers=headers), request.scope)
    service: Service = request.app.state.service
    return error_response(api_error(error, service.retry_after(error)), request.scope)


class _Routes:
    def __init__(self, service: Service, version: str) -> None:
        self._service = service
        self._version = version

    def add_to(self, app: FastAPI) -> None:
        routes: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat_completions),
            ("POST", "/v1/responses", self.responses),
            ("POST", "/v1/messages", self.messages),
            ("POST", "/v1/messages/count_tokens", self.count_tokens),
            ("POST", "/v1/embeddings", self.embeddings),
            ("POST", "/v1/rerank", self.rerank),
            ("POST", "/v2/rerank", self.rerank),  # Cohere's clients
            ("POST", "/v1/score", self.score),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{id:path}", self.one_model),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("GET", "/health", self.health),
            ("GET", "/load", self.load),
            ("GET", "/version", self.version),
            ("GET", "/metrics", self.metrics),
        ]
        for method, path, endpoint in routes:
            app.add_api_route(path, endpoint, methods=[method], response_model=None)

    async def completions(self, request: Request) -> Response:
        """Complete prompts."""
        return await self._reply(request, CompletionRequest, answer_completion)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a chat."""
        return await self._reply(request, ChatRequest, answer_chat)

    async def responses(self, request: Request) -> Response:
        """Answer a chat in the shapes of OpenAI's Responses, keeping nothing of it."""
        return await self._reply(request, ResponsesRequest, answer_responses)

    async def messages(self, request: Request) -> Response:
        """Answer a chat in the shapes of Anthropic's Messages."""
        return await self._reply(request, MessagesRequest, answer_messages)

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens the prompt of such a chat has."""
        body = await self._body(request, CountRequest)
        return _json(await count_tokens(self._service, body, MOST_TOKENIZED))

    async def embeddings(self, request: Request) -> Response:
        """Make vectors of texts."""
        return await self._reply(request, EmbeddingRequest, answer_embedding)

    async def rerank(self, request: Request) -> Response:
        """Order documents by how well they answer a query."""
        return await self._reply(request, RerankRequest, answer_rerank)

    async def score(self, request: Request) -> Response:
        """Say how well texts go together."""
        return await self._reply(request, ScoreRequest, answer_score)

    async def models(self) -> Response:
        """The names that requests may give."""
        models = await self._service.served()
        cards = [self._card(model, name) for model in models for name in model.info.names]
        return _json(shapes.ModelList("list", cards))

    async def one_model(self, id: str) -> Response:
        """One of the names that requests may give."""
        return _json(self._card(await self._service.model(id), id))

    @staticmethod
    def _card(model: ServedModel, name: str) -> shapes.Model:
        return shapes.Model(
            id=name,
            object="model",
            created=model.created,
            owned_by="manta",
            root=model.info.model,
            max_model_len=model.info.max_model_len,
        )

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a prompt, or of a chat as its template renders it."""
        body = await self._body(request, TokenizeRequest)
        model = await self._service.model(body.model)
        most = max(model.info.max_model_len, MOST_TOKENIZED)
        if (body.prompt is None) == (body.messages is None):
            raise wrong("give prompt or messages, one of the two", "prompt")
        if body.tools and body.messages is None:
            raise wrong("tools: they go with messages", "tools")
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            (ids,) = await self._service.encode(model, [body.prompt], special, most, "prompt")
        else:
            ids = (await render(self._service, model, body, most)).ids
        answer = shapes.Tokens(
            count=len(ids), max_model_len=model.info.max_model_len, tokens=ids, token_strs=None
        )
        if body.return_token_strs:
            answer.token_strs = await self._service.off_loop(_pieces, model.tokenizer, ids)
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        body = await self._body(request, DetokenizeRequest)
        model = await self._service.model(body.model)
        tokens, most = body.tokens, max(model.info.max_model_len, MOST_DETOKENIZED)
        if len(tokens) > most:
            raise wrong(f"tokens: a list may have at most {most}, got {len(tokens)}", "tokens")
        if (highest := max(tokens, default=0)) >= model.info.vocab_size:
            raise wrong(
                f"tokens has {highest}; the vocabulary ends at {model.info.vocab_size - 1}",
                "tokens",
            )
        text = await self._service.off_loop(model.tokenizer.decode, tokens)
        return _json(shapes.Detokenized(text))

    async def health(self) -> Response:
        """200 while an engine answers and makes progress, 503 otherwise."""
        self._service.check_admission()
        engines = await self._service.reachable()
        if not engines:
            if len(self._service.engines):
                raise unavailable("no engine makes progress", "unhealthy")
            raise unavailable("no engine is ready yet", "starting")
        if all(engine.load.draining for engine in engines):
            raise unavailable("every engine is shutting down", "draining")
        await self._service.models.load_all()  # so that no request waits for a tokenizer
        return Response(status_code=200)

    async def load(self) -> Response:
        """What the engines have to do."""
        states = engine_states(self._service.engines)
        return _json(shapes.Load(server_load=self._service.stats.in_flight, engines=states))

    async def version(self) -> Response:
        """The server's version."""
        found = [engine.info.batch_invariant for engine in self._service.engines]
        return _json(shapes.Version(self._version, all(found) if found else None))

    async def metrics(self, request: Request) -> Response:
        """Prometheus text of every engine and ingress process."""
        names = request.query_params.get("names", "vllm")
        if names not in PREFIXES:
            raise wrong(f"names must be {' or '.join(PREFIXES)}, got {names[:100]!r}", "names")
        return Response(await self._service.scrape(names), media_type=CONTENT_TYPE)

    async def _reply(
        self,
        request: Request,
        kind: type[R],
        answer: Callable[[Service, R], Awaitable[WholeAnswer]],
    ) -> Response:
        """What ``answer`` makes of the request's body. Raises as ``_body`` and ``answer`` do."""
        self._service.check_admission()
        body = await self._body(request, kind)
        own_id = _take_id(request, body)
        return Reply(await answer(self._service, body), own_id)

    async def _body(self, request: Request, kind: type[T]) -> T:
        """The request's body, checked. Raises ApiError, or RequestError for a wrong value."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json" and not media.endswith("+json"):
            raise ApiError(415, f"the content type must be application/json, got {media[:100]!r}")
        body = await receive_body(request, self._service)
        started = time.perf_counter()
        value = read(body, kind, self._service.config.allow_unknown_fields)
        spent = time.perf_counter() - started
        if value.model is not None and (model := self._service.models.named(value.model)):
            self._service.stats.asked_for(model.id)
        self._service.stats.observe("validate", spent)
        return value


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.id_to_piece(i) or "" for i in ids]


def _take_id(request: Request, body: Identified) -> bool:
    """Make the request's X-Request-Id its id, unless the body has one; False if that was done."""
    given = given_id(request.scope)
    if given is None or body.request_id is not None:
        return True
    body.request_id = given
    return False


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
