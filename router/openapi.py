"""The application's OpenAPI description, made from the structs that requests and answers are."""

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI

from router import shapes
from router.errors import ErrorResponse
from router.fields import HARMLESS, NEUTRAL
from router.messages_schema import CountRequest, MessagesRequest
from router.messages_shapes import AssistantMessage, MessagesError, TokenCount
from router.metrics import PREFIXES
from router.responses_schema import ResponsesRequest
from router.responses_shapes import Response
from router.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Message,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
    Tool,
)

_REF = "#/components/schemas/{name}"
_STATUS = {
    400: "A field is wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    422: "The chat template refuses the messages.",
    429: "Too many requests wait; try again.",
    500: "The server failed.",
    503: "No engine can take the request now; try again.",
}
_BODY = (400, 413, 415, 500, 503)
# Path to (method, request, answer, errors).
_PATHS: Mapping[str, tuple[str, Any, Any, tuple[int, ...]]] = {
    "/v1/completions": (
        "post", CompletionRequest, shapes.Completion, (*_BODY, 404, 429)
    ),
    "/v1/chat/completions": (
        "post", ChatRequest, shapes.ChatCompletion, (*_BODY, 404, 422, 429)
    ),
    "/v1/responses": (
        "post", ResponsesRequest, Response, (*_BODY, 404, 422, 429)
    ),
    "/v1/messages": ("post", MessagesRequest, AssistantMessage, (*_BODY, 404, 422, 429)),
    "/v1/messages/count_tokens": ("post", CountRequest, TokenCount, (*_BODY, 404, 422)),
    "/v1/embeddings": (
        "post", EmbeddingRequest, shapes.EmbeddingList, (*_BODY, 404, 429)
    ),
    "/v1/rerank": ("post", RerankRequest, shapes.Ranking, (*_BODY, 404, 422, 429)),
    "/v2/rerank": ("post", RerankRequest, shapes.Ranking, (*_BODY, 404, 422, 429)),
    "/v1/score": ("post", ScoreRequest, shapes.ScoreList, (*_BODY, 404, 422, 429)),
    "/v1/models": ("get", None, shapes.ModelList, (503,)),
    "/v1/models/{id}": ("get", None, shapes.Model, (404, 503)),
    "/tokenize": ("post", TokenizeRequest, shapes.Tokens, (*_BODY, 404, 422)),
    "/detokenize": ("post", DetokenizeRequest, shapes.Detokenized, (*_BODY, 404)),
    "/health": ("get", None, None, (503,)),
    "/load": ("get", None, shapes.Load, ()),
    "/version": ("get", None, shapes.Version, ()),
    "/metrics": ("get", None, None, (400,)),
}  # fmt: skip
_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "/v1/models/{id}": {
        "name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}
    },
    "/metrics": {
        "name": "names", "in": "query", "schema": {"enum": [*PREFIXES], "default": "vllm"}
    },
}  # fmt: skip
_STREAMS = {
    "/v1/completions": "a chunk as JSON; [DONE] at the end",
    "/v1/chat/completions": "a chunk as JSON; [DONE] at the end",
    "/v1/responses": "an event as JSON; its type is also the event's",
    "/v1/messages": "an event as JSON; its type is also the event's",
}
_ANTHROPIC = "/v1/messages"  # how the paths of routes with Anthropic's errors begin
_OPEN = ("/health", "/metrics")
_TEXTS = {
    "integer": r"^-?[0-9]{1,30}(\.0{1,30})?$",
    "number": r"^-?[0-9]{1,30}(\.[0-9]{1,30})?$",
}


def describe(app: FastAPI, keys: bool) -> None:
    """Give ``app`` its description; ``keys``: whether API keys are asked for."""
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(_description(app, keys))
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _description(app: FastAPI, keys: bool) -> dict[str, Any]:
    kinds = [k for _, *pair, _ in _PATHS.values() for k in pair if k is not None]
    refs, schemas = msgspec.json.schema_components(
        [*kinds, ErrorResponse, MessagesError, Message, Tool], ref_template=_REF
    )
    by_kind = dict(zip(kinds, refs, strict=False))
    _complete(schemas)
    paths: dict[str, Any] = {}
    for path, (method, request, answer, errors) in _PATHS.items():
        operation: dict[str, Any] = {
            "summary": _summary(app, path),
            "operationId": f"{method}{path}".replace("/", "_").replace("{id}", "id"),
            "responses": _responses(path, by_kind.get(answer), errors, keys),
        }
        if request is not None:
            content = {"application/json": {"schema": by_kind[request]}}
            operation["requestBody"] = {"required": True, "content": content}
        if path in _PARAMETERS:
            operation["parameters"] = [_PARAMETERS[path]]
        if keys and path not in _OPEN:
            operation["security"] = [{"key": []}]
        paths[path] = {method: operation}
    components: dict[str, Any] = {"schemas": schemas}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": app.title, "version": app.version},
        "paths": paths,
        "components": components,
    }


def _summary(app: FastAPI, path: str) -> str:
    for route in app.routes:
        if getattr(route, "path", "").replace(":path", "") == path:
            return str(getattr(route, "description", ""))
    return ""


def _responses(path: str, answer: Any, errors: tuple[int, ...], keys: bool) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "Done."}
    if answer is not None:
        good["content"] = {"application/json": {"schema": answer}}
    if path == "/metrics":
        good["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in _STREAMS:
        data = {"type": "string", "description": _STREAMS[path]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        good["content"]["text/event-stream"] = {"schema": event}
    described: dict[str, Any] = {"200": good}
    if keys and path not in _OPEN:
        errors = (*errors, 401)
    for status in sorted(errors):
        kind = "MessagesError" if path.startswith(_ANTHROPIC) else "ErrorResponse"
        schema = {"$ref": _REF.format(name=kind)}
        described[str(status)] = {
            "description": _STATUS[status],
            "content": {"application/json": {"schema": schema}},
        }
        if status in (429, 503):
            described[str(status)]["headers"] = {
                "Retry-After": {"schema": {"type": "string"}, "description": "seconds"}
            }
    return described


def _complete(schemas: dict[str, Any]) -> None:
    """What the structs do not say: the shape of messages, and fields with neutral values only."""
    schemas["Message"]["additionalProperties"] = False
    asked = [kind.__name__ for _, kind, _, _ in _PATHS.values() if kind is not None]
    for name in dict.fromkeys(asked):
        properties = schemas[name]["properties"]
        for field in NEUTRAL.keys() & properties.keys():  # known here, not everywhere
            properties[field]["anyOf"].append({"enum": ["", [], {}]})
    for name in ("ChatRequest", "TokenizeRequest"):
        properties = schemas[name]["properties"]
        for field, item in (("messages", "Message"), ("tools", "Tool")):
            listed = properties.get(field, {})
            for kind in (listed, *listed.get("anyOf", ())):
                if "items" in kind:
                    kind["items"] = {"$ref": _REF.format(name=item)}
    for name in asked:
        schemas[name]["additionalProperties"] = {"type": "null"}
    kinds = {
        name: set(schemas[name]["properties"])
        for name in asked
        if name not in ("TokenizeRequest", "DetokenizeRequest")
    }
    for name in (*kinds, "ThinkingOptions"):
        properties = schemas[name]["properties"]
        for field in properties:
            properties[field] = _with_numbers_as_text(properties[field])
    for name in kinds:
        properties = schemas[name]["properties"]
        for field in set(HARMLESS) - kinds[name]:
            properties[field] = {"description": "accepted; has no effect"}
        for field, values in NEUTRAL.items():
            if field in kinds[name]:
                continue
            properties[field] = {
                "description": "not supported",
                "enum": [None, "", [], {}, *values],
                "default": None,
            }


def _with_numbers_as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may have its number as text; see ``fields.read``."""
    kinds = schema.get("anyOf", [schema])
    numbers = [kind["type"] for kind in kinds if kind.get("type") in _TEXTS]
    if not numbers:
        return schema
    text = {"type": "string", "pattern": _TEXTS[numbers[0]]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*kinds, text]}
    return {"anyOf": [schema, text]}
