"""The application's own OpenAPI description, tried out by schemathesis: whatever a request is made
of, no answer is a 5xx, and every answer is as described."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.support.server import Server, serving
from tests.support.waiting import PATIENCE

KEY = "sk-test"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    ignored_auth,
]


SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = {"api_key": KEY, "request_timeout": 0.3}
    with serving(options, max_model_len=256, pooling="last") as server:
        yield server


@pytest.fixture(scope="module")
def schema(server: Server) -> BaseSchema:
    url, headers = f"{server.url}/openapi.json", {"Authorization": f"Bearer {KEY}"}
    config = schemathesis.Config.from_dict({"headers": headers})
    return schemathesis.openapi.from_url(url, config=config, headers=headers)


POSTS = [
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize",
]  # fmt: skip
# Fewer where the way is that of a chat.
EXAMPLES = {"/v1/responses": 25, "/v1/messages": 25, "/v1/messages/count_tokens": 10}
STATELESS = ("background", "conversation", "previous_response_id", "prompt")
RERANKS = ["/v1/rerank", "/v2/rerank", "/v1/score"]  # which this model does not
GETS = ["/v1/models", "/v1/models/{id}", "/health", "/load", "/version", "/metrics"]


def test_every_route_is_described(schema: BaseSchema) -> None:
    described = {(method, path) for path in schema for method in schema[path]}
    posts = {("post", path) for path in POSTS + RERANKS}
    assert described == posts | {("get", path) for path in GETS}


@pytest.mark.parametrize("path", GETS)
def test_reading(path: str, schema: BaseSchema) -> None:
    @settings(max_examples=5, **SETTINGS)
    @given(case=schema[path]["get"].as_strategy())
    def attempt(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=PATIENCE)

    attempt()


@pytest.mark.parametrize("path", POSTS)
def test_valid_requests(path: str, schema: BaseSchema) -> None:
    """Valid by the description, that is. They get far enough for the engine to run many."""
    statuses = []

    @settings(max_examples=EXAMPLES.get(path, 60), **SETTINGS)
    @given(case=schema[path]["post"].as_strategy())
    def attempt(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body = likely(case.body, path)
            if path == "/v1/messages":
                case.body["max_tokens"] = 5
        statuses.append(case.call_and_validate(checks=CHECKS, timeout=PATIENCE).status_code)

    attempt()
    assert statuses.count(200) >= 5, statuses


def likely(body: dict[str, Any], path: str) -> dict[str, Any]:
    """The request without what is valid by itself, but hardly ever for this model, or together."""
    for field in ("model", "chat_template", "chat_template_kwargs", "documents", "max_tokens"):
        body.pop(field, None)
    options = ("tools", "tool_choice", "text", "output_config", "system", "dimensions")
    for field in (*options, *(STATELESS if path == "/v1/responses" else ())):
        body.pop(field, None)
    for field in ("prompt", "input", "tokens", "stop_token_ids", "allowed_token_ids"):
        if field in body:
            body[field] = in_vocabulary(body[field])
    if body.get("messages"):
        body.pop("prompt", None)
        for message in body["messages"]:
            message.pop("tool_calls", None)
            message["role"] = "user"
            message["content"] = message.get("content") or "Hello"
    elif "input" in body:
        if path == "/v1/responses" and not isinstance(body["input"], str):
            body["input"] = "Hello"
        body["input"] = body["input"] or "Hello"
    elif "tokens" not in body:
        body["prompt"] = body.get("prompt") or "Hello"
    if body.get("continue_final_message"):
        body["add_generation_prompt"] = False
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    return {name: value for name, value in body.items() if value is not None}


def in_vocabulary(value: Any) -> Any:
    """The value with every integer in it made the id of a token."""
    if isinstance(value, list):
        return [in_vocabulary(one) for one in value]
    return value % 4096 if isinstance(value, int) else value


@pytest.mark.parametrize("path", [*POSTS, "/v1/rerank", "/v1/score"])
def test_invalid_requests(path: str, schema: BaseSchema) -> None:
    negative = schemathesis.GenerationMode.NEGATIVE

    @settings(max_examples=EXAMPLES.get(path, 60), **SETTINGS)
    @given(case=schema[path]["post"].as_strategy(generation_mode=negative))
    def attempt(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=PATIENCE)

    attempt()


def test_nothing_is_left(server: Server) -> None:
    server.assert_idle()
