"""The application's own OpenAPI description, tried out by schemathesis: whatever a request is made
of, no answer is a 5xx, and every answer is as described."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.support.server import Server, serving

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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving({"api_key": KEY, "request_timeout": 0.3}, max_model_len=256) as server:
        yield server


@pytest.fixture
def description(server: Server) -> object:
    config = schemathesis.Config.from_dict({"headers": {"Authorization": f"Bearer {KEY}"}})
    url = f"{server.url}/openapi.json"
    return schemathesis.openapi.from_url(
        url, config=config, headers={"Authorization": f"Bearer {KEY}"}
    )


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(case: schemathesis.Case, server: Server) -> None:
    case.call_and_validate(checks=CHECKS, timeout=20)


def test_nothing_is_left(server: Server) -> None:
    server.assert_idle()
