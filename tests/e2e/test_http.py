"""The routes by bare HTTP: statuses, limits, keys, disconnects, drain; and ``curl``."""

import json
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.client import EngineLoad
from cluster.loop import LocalClient
from engine.config import EMBEDDED_MODEL
from tests.support.server import ENGINE_OPTIONS, Server, serving
from tests.support.waiting import PATIENCE, until

FRANCE = "The capital of France is"
CHAT = "/v1/chat/completions"
ROUTER: dict[str, Any] = {"max_body_bytes": 20_000, "trust_request_chat_template": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(ROUTER, max_num_seqs=4, swap_space=0.01) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def test_small_routes(http: httpx.Client, server: Server) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/version").json() == {"version": "test", "batch_invariant": True}
    load = http.get("/load").json()
    assert load["server_load"] == 0
    (engine,) = load["engines"]
    assert engine["healthy"] and engine["running"] == engine["waiting"] == 0
    assert engine["free_blocks"] == engine["blocks"] == server.engine.capacity.num_device_blocks
    docs = http.get("/docs")
    assert docs.status_code == 200 and "/openapi.json" in docs.text
    assert http.get("/openapi.json").json()["paths"].keys() >= {"/v1/models", CHAT}


def test_head_is_get_without_the_body(http: httpx.Client) -> None:
    for path in ("/health", "/v1/models", "/v1/models/manta-demo", "/metrics", "/openapi.json"):
        head, get = http.head(path), http.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b"", path
        assert head.headers.get("content-type") == get.headers.get("content-type"), path
    assert http.head("/health").headers["content-length"] == "0"
    assert http.head(CHAT).status_code == 405 and http.head("/none").status_code == 404


def test_a_client_that_goes_in_its_body_leaves_no_traceback(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    before = server.service.stats.metrics(())
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with (
        caplog.at_level("INFO", "manta"),
        socket.create_connection(("127.0.0.1", server.port)) as connection,
    ):
        connection.sendall(head.encode() + b'Content-Length: 100\r\n\r\n{"messages": [')
    until(lambda: server.service.stats.metrics(()) != before, PATIENCE)
    assert not caplog.records


def test_tokenize_and_back(http: httpx.Client, server: Server) -> None:
    answer = http.post("/tokenize", json={"prompt": FRANCE, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 5
    assert answer["max_model_len"] == 2048
    text = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert text == {"prompt": FRANCE}
    messages = [{"role": "user", "content": "Hi"}]
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    rendered = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    body = {"messages": messages, "add_generation_prompt": False}
    shorter = http.post("/tokenize", json=body).json()["tokens"]
    assert tokens[: len(shorter)] == shorter and len(shorter) < len(tokens)
    for body in ({}, {"prompt": "x", "messages": messages}):
        assert "one of the two" in error_of(http.post("/tokenize", json=body))["message"]
    error = error_of(http.post("/detokenize", json={"tokens": [4096]}))
    assert error["param"] == "tokens" and "4095" in error["message"]


def test_wrong_bodies(http: httpx.Client) -> None:
    post = {"content-type": "application/json"}
    for body in (b"", b"{", b"[1]", b"\xff", b"[" * 19_000, b'{"prompt":"x","n":1e999}'):
        response = http.post("/v1/completions", content=body, headers=post)
        assert response.status_code == 400, body[:20]
        assert "JSON" in error_of(response)["message"]
    form = http.post("/v1/completions", data={"prompt": "x"})
    assert form.status_code == 415 and "application/json" in error_of(form)["message"]
    error = error_of(http.post(CHAT, json={}))
    assert error["param"] == "messages" and error["code"] == "missing_required_parameter"


def test_large_bodies(http: httpx.Client, server: Server) -> None:
    large = json.dumps({"prompt": "x" * 20_000}).encode()
    response = http.post(
        "/v1/completions", content=large, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413 and error_of(response)["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:  # without a content-length
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    response = http.post(
        "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    almost = {"prompt": "x", "user": "y" * 19_000}
    assert http.post("/v1/completions", json=almost).status_code == 200


def test_unknown_fields_inside(http: httpx.Client) -> None:
    message = {"role": "user", "content": "Hi"}
    stream = {"stream": True, "stream_options": {"more": 1}}
    for body, name in (
        ({"messages": [message], **stream}, "stream_options.more"),
        ({"messages": [{**message, "annotations": [1]}]}, "annotations"),
        ({"messages": [{**message, "content": [{"type": "text", "x": 1}]}]}, "content"),
    ):
        response = http.post(CHAT, json=body)
        assert response.status_code == 400 and name in error_of(response)["message"]


def test_no_such_route(http: httpx.Client) -> None:
    missing = http.get("/v1/nothing")
    assert missing.status_code == 404 and error_of(missing)["type"] == "invalid_request_error"
    wrong_method = http.get("/v1/completions")
    assert wrong_method.status_code == 405 and wrong_method.headers["allow"] == "POST"
    error_of(wrong_method)
    model = http.get("/v1/models/a/b")
    assert model.status_code == 404 and error_of(model)["code"] == "model_not_found"


def test_neutral_and_harmless_fields(http: httpx.Client) -> None:
    fields = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "tools": None, "tool_choice": "none",
        "response_format": {"type": "text"}, "service_tier": "auto", "parallel_tool_calls": True,
        "best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "modalities": ["text"],
    }  # fmt: skip
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **fields}
    assert http.post(CHAT, json=body).status_code == 200
    for name, value in (
        ("modalities", ["audio"]),
        ("length_penalty", 0.5),
        ("use_beam_search", True),
    ):
        error = error_of(http.post(CHAT, json={**body, name: value}))
        assert error["param"] == name and error["code"] == "unsupported_value"


def test_a_template_of_the_request(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": FRANCE}],
        "chat_template": "{{ messages[0].content }}{{ more }}",
        "chat_template_kwargs": {"more": " a city"},
        "temperature": 0,
        "max_tokens": 5,
    }
    chat = http.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    prompt = {"prompt": f"{FRANCE} a city", "temperature": 0, "max_tokens": 5}
    assert chat == http.post("/v1/completions", json=prompt).json()["choices"][0]["text"]
    broken = http.post(CHAT, json={**body, "chat_template": "{% for %}"})
    assert 400 <= broken.status_code < 500


def test_the_request_id(http: httpx.Client) -> None:
    body = {"prompt": FRANCE, "max_tokens": 1, "request_id": "mine"}
    for _ in range(2):
        response = http.post("/v1/completions", json=body)
        assert response.headers["x-request-id"] == response.json()["id"] == "cmpl-mine"
    for wrong in ("", "with space", "line\n", "x" * 257):
        response = http.post("/v1/completions", json={**body, "request_id": wrong})
        assert response.status_code == 400 and error_of(response)["param"] == "request_id"


def test_what_nobody_foresaw(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered like any error: counted, and readable for pages of other origins."""
    monkeypatch.setattr(server.service, "encode", None)

    def counted() -> int:
        answers = server.service.stats.answers.items()
        return sum(n for key, n in answers if key[:3] == ("POST", "/v1/completions", "500"))

    before = counted()
    headers = {"origin": "https://a.example"}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        response = http.post("/v1/completions", json={"prompt": FRANCE})
    assert response.status_code == 500 and "NoneType" not in response.text
    assert error_of(response)["type"] == "server_error"
    assert response.headers["access-control-allow-origin"] == "*"
    assert counted() == before + 1


def test_pages_of_other_origins(http: httpx.Client) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert http.options(CHAT, headers=headers).headers["access-control-allow-origin"] == "*"


RAW = (
    "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\n\r\n{body}"
)


def send_raw(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    text = json.dumps(body)
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(RAW.format(path=path, length=len(text), body=text).encode())
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_while_its_request_runs(stream: bool, server: Server) -> None:
    body = {"prompt": FRANCE, "max_tokens": 2000, "ignore_eos": True, "stream": stream, "n": 2,
            "temperature": 1}  # fmt: skip
    connection = send_raw(server, "/v1/completions", body)
    until(lambda: len(server.engine.scheduler.running) == 2, PATIENCE)
    connection.close()
    server.assert_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_while_its_request_waits(stream: bool, server: Server) -> None:
    """4 run; those behind them wait, and their going disturbs nobody."""
    running = send_raw(
        server,
        "/v1/completions",
        {"prompt": FRANCE, "max_tokens": 300, "ignore_eos": True, "n": 4, "temperature": 1},
    )
    until(lambda: len(server.engine.scheduler.running) == 4, PATIENCE)
    waiting = send_raw(
        server, "/v1/completions", {"prompt": ["Hello", "Bye"], "max_tokens": 9, "stream": stream}
    )
    until(lambda: server.engine.scheduler.num_waiting == 2, PATIENCE)
    waiting.close()
    until(lambda: server.engine.scheduler.num_waiting == 0, PATIENCE)
    assert len(server.engine.scheduler.running) == 4
    data = b""
    while b'"usage"' not in data:
        data += running.recv(65536)
    assert b" 200 OK" in data.splitlines()[0] and data.count(b'"finish_reason":"length"') == 4
    running.close()
    server.assert_idle()


def test_curl(server: Server) -> None:
    body = json.dumps({"prompt": FRANCE, "temperature": 0, "max_tokens": 3, "stream": True})
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-d", body]
    headers = ["-H", "Content-Type: application/json"]
    done = subprocess.run(command + headers, capture_output=True, text=True, check=True)
    *events, last = done.stdout.strip().split("\n\n")
    assert last == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " Paris. It"


def test_an_engine_that_dies_in_a_stream(server: Server) -> None:
    """Whoever streams gets an error event; later requests a 503; a new engine serves again."""
    few = {"max_num_seqs": 2, "failover_timeout": 1.0}
    with serving(**few) as server, httpx.Client(base_url=server.url) as http:
        body = {"prompt": FRANCE, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            engine = server.engine

            def fail() -> None:
                raise OSError("the wire burned")

            server.loops[0].post(lambda: setattr(engine.scheduler, "plan", fail))
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert "the wire burned" in error["message"] and error["type"] == "server_error"
        for path in ("/health", "/v1/models"):
            assert http.get("/health").status_code == 503, path
        response = http.post("/v1/completions", json={"prompt": FRANCE})
        assert response.status_code == 503 and 1 <= int(response.headers["retry-after"]) <= 5
        error_of(response)
        until(lambda: server.service.stats.in_flight == 0)


def test_drain(server: Server) -> None:
    server.service.draining = True
    try:
        with httpx.Client(base_url=server.url) as http:
            for response in (
                http.post("/v1/completions", json={"prompt": FRANCE}),
                http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]}),
                http.get("/health"),
            ):
                assert response.status_code == 503 and response.headers["retry-after"] == "1"
                assert error_of(response)["code"] == "draining"
            assert http.get("/version").status_code == 200
    finally:
        server.service.draining = False


def test_starting(server: Server) -> None:
    engines = server.engines[:]
    server.engines.clear()
    models, server.service.models._models = server.service.models._models, {}
    try:
        with httpx.Client(base_url=server.url) as http:
            for response in (
                http.post("/v1/completions", json={"prompt": FRANCE}),
                http.get("/health"),
                http.get("/v1/models"),
            ):
                assert response.status_code == 503
                assert 1 <= int(response.headers["retry-after"]) <= 5
                assert error_of(response)["code"] == "starting"
    finally:
        server.engines.extend(engines)
        server.service.models._models = models


def test_keys_names_and_unknown_fields() -> None:
    router = {
        "api_key": ["sk-a", "sk-b"],
        "served_model_name": "other",
        "allow_unknown_fields": True,
        "root_path": "/llm",
        "allowed_origins": ["https://a.example"],
        "request_timeout": 0.2,
    }
    with serving(router) as server, httpx.Client(base_url=server.url) as http:
        for path in ("/v1/models", "/version", "/load", "/docs", "/openapi.json", "/tokenize"):
            for headers in ({}, {"authorization": "Bearer sk-c"}, {"authorization": "sk-a"},
                            {"authorization": "Basic sk-a"}):  # fmt: skip
                response = http.get(path, headers=headers)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert error_of(response)["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 200
        http.headers["authorization"] = "bearer sk-b"
        assert http.get("/v1/models").json()["data"][0]["id"] == "other"
        assert http.get("/llm/v1/models").status_code == 200
        assert http.get("/llm/health", headers={"authorization": ""}).status_code == 200
        body = {"prompt": FRANCE, "model": "other", "tempature": 1}
        assert http.post("/v1/completions", json=body).status_code == 200
        part = {"type": "text", "text": "Hi", "cache_control": {}}
        chat = {
            "messages": [{"role": "user", "content": [part], "annotations": [1]}],
            "stream": True,
            "stream_options": {"include_usage": True, "more": 1},
        }
        assert http.post(CHAT, json=chat).status_code == 200
        image = {"messages": [{"role": "user", "content": [{**part, "type": "image_url"}]}]}
        assert http.post(CHAT, json=image).status_code == 400
        supported = http.post("/v1/completions", json={**body, "suffix": "x"})
        assert error_of(supported)["param"] == "suffix"
        old = http.post("/v1/completions", json={**body, "model": EMBEDDED_MODEL})
        assert old.status_code == 404
        # The timeout ends a request with what it has.
        long = {"prompt": FRANCE, "max_tokens": 2000, "ignore_eos": True}
        ended = http.post("/v1/completions", json=long).json()["choices"][0]
        assert (ended["finish_reason"], ended["stop_reason"]) == ("abort", "timeout")
        assert ended["text"].startswith(" Paris") or ended["text"]
        origin = http.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in origin.headers
        server.assert_idle()


def test_two_engines_share_the_work(server: Server) -> None:
    """A second engine joins: same prefixes go to the same engine, others to both."""
    import asyncio

    assert server._loop is not None
    start = LocalClient.start(EMBEDDED_MODEL, **ENGINE_OPTIONS)
    second = asyncio.run_coroutine_threadsafe(start, server._loop).result()
    server.engines.append(second)
    try:
        with httpx.Client(base_url=server.url) as http:
            for number in range(24):
                body = {"prompt": f"{number} " * 40, "max_tokens": 1}
                for _ in range(2):
                    usage = http.post("/v1/completions", json=body).json()["usage"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                assert cached >= usage["prompt_tokens"] - 17  # the second time it is all there
        counts = [engine.load for engine in server.engines]
        assert all(isinstance(load, EngineLoad) for load in counts)
        steps = [loop.engine.scheduler.stats.steps for loop in (server.loops[0], second._loop)]
        assert min(steps) >= 8, steps
    finally:
        server.engines.remove(second)
        asyncio.run_coroutine_threadsafe(second.close(), server._loop).result()
