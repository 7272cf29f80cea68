"""Requests that would cost far more than they may: refused, with the reason, and nobody waits."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from cluster import loop
from router import bodies
from router.guard import client_of
from tests.support.server import Server, serving
from tests.support.waiting import PATIENCE, until

CHAT = "/v1/chat/completions"
HELLO = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_num_seqs=8, max_logprobs=-1) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer, which is short whatever was sent."""
    assert response.status_code == status, response.text[:1000]
    assert len(response.content) < 4000
    return dict(response.json()["error"])


def half_a_body(server: Server, size: int) -> socket.socket:
    """A connection that has sent ``size`` bytes of a body and no more of it."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {size + 100}\r\n\r\n"
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + b"x" * size)
    return connection


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and error of what comes, until the server closes."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


# ---- bodies ----


def test_a_body_that_does_not_come_has_a_deadline(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 1.0)
    for size in (0, 10):
        with closing(half_a_body(server, size)) as connection:
            status, error = answer_of(connection)
        assert status == 408 and error["code"] == "request_timeout"
        assert error["message"] == "the body took longer than 1 s"


def test_large_bodies_that_do_not_come_to_their_end_share_a_bound(
    server: Server, http: httpx.Client, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bodies, "MOST_BYTES", 50_000)
    halves = [half_a_body(server, 20_000) for _ in range(2)]
    with closing(half_a_body(server, 20_000)) as third:
        status, error = answer_of(third)
    assert status == 503 and error["code"] == "overloaded"
    assert http.post("/v1/completions", json=HELLO).status_code == 200  # small ones go in
    for half in halves:
        half.close()
    server.assert_idle()
    large = {**HELLO, "user": "y" * 45_000}
    assert http.post("/v1/completions", json=large).status_code == 200
    assert server.service.body_bytes == 0


def test_a_drain_does_not_wait_for_half_a_body() -> None:
    with serving() as server, closing(half_a_body(server, 10)) as connection:
        server.loops[0].drain(closing=True)
        status, error = answer_of(connection)
        assert status == 503 and error["code"] == "draining"


# ---- what would cost far more than it may ----


def test_text_that_could_never_fit_is_refused_by_its_size(http: httpx.Client) -> None:
    """Fifteen megabytes took a minute and six gigabytes; of spaces, the tokenizer panicked."""
    for text in ("a", " ", "hello, ", "\u4e16"):
        long = text * (15_000_000 // len(text.encode()))
        error = refused(http.post("/v1/completions", json={**HELLO, "prompt": long}))
        assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
        assert f"{len(long)} characters" in error["message"]
    error = refused(http.post("/v1/completions", json={**HELLO, "prompt": ["x", long]}))
    assert error["code"] == "context_length_exceeded"
    messages = [{"role": "user", "content": long}]
    for path in (CHAT, "/tokenize"):
        error = refused(http.post(path, json={"messages": messages}))
        assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    error = refused(http.post("/tokenize", json={"prompt": long}))
    assert error["param"] == "prompt" and "131072 tokens" in error["message"]


def test_text_that_may_fit_is_counted(http: httpx.Client, server: Server) -> None:
    error = refused(http.post("/v1/completions", json={**HELLO, "prompt": "no no " * 1200}))
    assert error["code"] == "context_length_exceeded" and "2401 tokens" in error["message"]
    counted = http.post("/tokenize", json={"prompt": "no no " * 1200}).json()
    assert counted["count"] == 2401
    many = [f"{i} " + "no no " * 900 for i in range(20)]  # more characters than are encoded at once
    ids = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in many[:2]]
    body = {**HELLO, "prompt": many, "max_tokens": 1, "return_token_ids": True}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices[:2]] == ids


def test_token_ids_that_do_not_fit_are_refused_by_their_number(http: httpx.Client) -> None:
    for prompt in ([7] * 3_000_000, [[7] * 1_000_000, [7]]):
        error = refused(http.post("/v1/completions", json={**HELLO, "prompt": prompt}))
        assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("stop", ["x"] * 129, "<= 128"),
        ("stop", "x" * 4097, "<= 4096"),
        ("stop_token_ids", [1] * 4097, "<= 4096"),
        ("bad_words", ["x"] * 1025, "<= 1024"),
        ("bad_words", ["x" * 1025], "<= 1024"),
        ("bad_words", [f"{i} " + "no " * 80 for i in range(1024)], "at most 65536"),
        ("allowed_token_ids", [1] * ((1 << 18) + 1), "<= 262144"),
        ("allowed_token_ids", [1] * 5000, "the vocabulary has 4096"),
        ("messages", [{"role": "user", "content": "x"}] * ((1 << 16) + 1), "<= 65536"),
        ("logit_bias", {str(i): 1 for i in range(16385)}, "<= 16384"),
    ],
)
def test_lists_have_a_limit_that_is_named(
    http: httpx.Client, name: str, value: Any, allowed: str
) -> None:
    path, body = (CHAT, {}) if name == "messages" else ("/v1/completions", HELLO)
    error = refused(http.post(path, json={**body, name: value}))
    assert error["param"].startswith(name) and allowed in error["message"]


def test_detokenize_has_a_limit(http: httpx.Client) -> None:
    error = refused(http.post("/detokenize", json={"tokens": [7] * 65_537}))
    assert error["param"] == "tokens" and "at most 65536" in error["message"]
    answer = http.post("/detokenize", json={"tokens": [7] * 65_536})
    one = http.post("/detokenize", json={"tokens": [7]}).json()["prompt"]
    assert answer.json()["prompt"] == one * 65_536


def test_log_probabilities_have_a_limit_and_no_connection_breaks(
    http: httpx.Client, server: Server
) -> None:
    """The engine let the router's connection go, and with it everybody's requests."""
    for more in (
        {"n": 128, "temperature": 1.0, "logprobs": -1},
        {"max_tokens": 2000, "logprobs": 4096},
        {"max_tokens": 1, "prompt": [7] * 2000, "prompt_logprobs": -1},
    ):
        error = refused(http.post("/v1/completions", json={**HELLO, **more}))
        name = "prompt_logprobs" if "prompt_logprobs" in more else "logprobs"
        assert error["param"] == name and "1048576 are allowed" in error["message"]
    error = refused(
        http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}],
                              "logprobs": True, "top_logprobs": -1})
    )  # fmt: skip
    assert error["param"] == "logprobs"
    body = {**HELLO, "max_tokens": 20, "ignore_eos": True, "logprobs": -1}
    answer = http.post("/v1/completions", json=body).json()["choices"][0]
    events = http.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    streamed = [json.loads(event[6:])["choices"] for event in events[:-2]]
    assert "".join(choice["text"] for (choice,) in streamed) == answer["text"]
    tops = [top for (choice,) in streamed for top in choice["logprobs"]["top_logprobs"]]
    assert tops == answer["logprobs"]["top_logprobs"] and len(tops) == 20
    many = {**HELLO, "n": 128, "temperature": 1.0, "logprobs": 20, "max_tokens": 8}
    assert len(http.post("/v1/completions", json=many).json()["choices"]) == 128


def test_log_probabilities_of_all_requests_have_a_limit(server: Server, monkeypatch: Any) -> None:
    """Five, of which there is room for four: those are served, and the fifth may come again."""
    monkeypatch.setattr(loop, "MOST_LOGPROBS_AT_ONCE", 4 * 25 * 4096)
    body = {**HELLO, "max_tokens": 25, "ignore_eos": True, "logprobs": -1}

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url) as client:
            return await asyncio.gather(
                *(client.post("/v1/completions", json=body) for _ in range(5))
            )

    answers = asyncio.run(ask())
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429]
    (late,) = [answer for answer in answers if answer.status_code == 429]
    assert "409600" in late.json()["error"]["message"] and late.headers["retry-after"]
    server.assert_idle()


def test_deep_and_large_values_are_told_of_in_short(http: httpx.Client) -> None:
    deep = json.loads("[" * 900 + "]" * 900)

    def message(arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": arguments}}
        return {"role": "assistant", "tool_calls": [call]}

    for wrong in (
        message("[" * 100_000 + "]" * 100_000),
        {"role": "user", "content": deep},
        {"role": "user", "content": [{"type": "text", "text": "x" * 5_000_000, "y": 1}]},
        {"role": "user", "name": deep, "content": "x"},
        {"role": "x" * 1_000_000},
        message("x" * 1_000_000),
    ):
        refused(http.post(CHAT, json={"messages": [wrong]}))
    for name in ("x" * 1_000_000, "tools", "best_of"):
        refused(http.post("/v1/completions", json={**HELLO, name: deep}))
    for name in ("model", "request_id"):
        response = http.post("/v1/completions", json={**HELLO, name: "x" * 1_000_000})
        refused(response, 404 if name == "model" else 400)
    hello = {"role": "user", "content": "x"}
    for depth in (*range(850, 1000, 10), 2000):
        arguments = "[" * depth + "]" * depth
        for one in (f'"{arguments}"', arguments):
            body = json.dumps({"messages": [hello, message("DEEP")]}).replace('"DEEP"', one)
            for text in (body, body.replace('"x"', arguments)):
                headers = {"content-type": "application/json"}
                answer = http.post(CHAT, content=text, headers=headers)
                assert answer.status_code in (200, 400, 422), (depth, answer.text)


# ---- fair shares ----


def test_a_client_with_many_requests_holds_nobody_else_up() -> None:
    """As HAProxy tells the address: the last of the header's, whatever a client writes there."""
    body = {**HELLO, "max_tokens": 40, "ignore_eos": True}
    done: list[str] = []

    async def one(client: httpx.AsyncClient, name: str, address: str) -> None:
        headers = {"x-forwarded-for": f"{len(done)}.0.0.1, {address}"}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        done.append(name)

    async def ask(url: str) -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, limits=limits) as client:
            hog = [asyncio.create_task(one(client, "hog", "10.0.0.1")) for _ in range(30)]
            await asyncio.to_thread(until, lambda: server.engine.scheduler.num_waiting > 20)
            await one(client, "late", "10.0.0.2")
            await asyncio.gather(*hog)

    with serving(scheduling_policy="fair", max_num_seqs=2) as server:
        asyncio.run(ask(server.url))
    assert done.index("late") < 15


def test_who_a_request_is_from() -> None:
    def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
        return {"type": "http", "headers": list(headers), "client": ("127.0.0.1", 1)}

    forwarded = (b"x-forwarded-for", b"9.9.9.9"), (b"x-forwarded-for", b"8.8.8.8, 10.0.0.1")
    keys = [(b"authorization", b"Bearer " + key) for key in (b"one", b"two", b"one")]
    assert client_of(scope(*forwarded), by_key=False) == "10.0.0.1"
    assert client_of(scope(), by_key=False) == "127.0.0.1"
    one, two, again = (client_of(scope(*forwarded, key), by_key=True) for key in keys)
    assert one == again != two and "one" not in one
