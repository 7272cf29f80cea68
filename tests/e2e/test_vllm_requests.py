"""Requests as vLLM's users send them: what asks for nothing passes, numbers are numbers however
they are written, and what vLLM has null can be read."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from engine.config import EMBEDDED_MODEL
from router.fields import NEUTRAL
from router.schema import ChatRequest, TokenizeRequest
from tests.support.server import Server, serving

FRANCE = "The capital of France is"
USER: dict[str, Any] = {"role": "user", "content": "What is the capital of France?"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_logprobs=4096) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(http: httpx.Client, **fields: Any) -> Any:
    """The first choice of a greedy completion."""
    answer = http.post(COMPLETIONS, json={"prompt": FRANCE, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def chat(http: httpx.Client, *messages: dict[str, Any], **fields: Any) -> Any:
    """The message of a greedy answer."""
    body = {"messages": messages or [USER], "temperature": 0, "max_tokens": 8, **fields}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def refused(http: httpx.Client, path: str, status: int = 400, **fields: Any) -> dict[str, Any]:
    body = {"prompt": FRANCE} if path != CHAT else {"messages": [USER]}
    answer = http.post(path, json=body | fields)
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


# ---- what asks for nothing ----


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_supported_may_ask_for_nothing(name: str, http: httpx.Client) -> None:
    values = [None, [], {}, *NEUTRAL[name]]
    own = {CHAT: ChatRequest.__struct_fields__, "/tokenize": TokenizeRequest.__struct_fields__}
    for path in (COMPLETIONS, CHAT, "/tokenize"):
        if name in own.get(path, ()):
            continue
        for value in values if path == "/tokenize" else values[-1:]:
            body = {"max_tokens": 1} if path != "/tokenize" else {}
            body |= {"messages": [USER]} if path == CHAT else {"prompt": FRANCE}
            assert http.post(path, json=body | {name: value}).status_code == 200, (path, value)
        error = refused(http, path, **{name: "something"})
        assert (error["param"], error["code"]) == (name, "unsupported_value")


def test_fields_that_ask_for_nothing(http: httpx.Client) -> None:
    expected = chat(http)
    for fields in (
        {"top_logprobs": 0},
        {"documents": [], "tools": [], "tool_choice": None},
        {"stream_options": {"include_usage": False}},
        {"a_field_of_another_server": None},
        {"chat_template_kwargs": {"enable_thinking": False, "thinking": None}},
        {"max_tokens": 3, "max_completion_tokens": 8},  # the newer name goes before
        {"seed": -1, "priority": 0, "logit_bias": {}, "bad_words": [], "stop": []},
    ):
        assert chat(http, **fields) == expected, fields
    prompt = {"messages": [USER], "tools": [], "documents": []}
    assert http.post("/tokenize", json=prompt).status_code == 200


def test_fields_that_ask_for_something_that_is_not_there(http: httpx.Client) -> None:
    for path, fields, param in (
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"a_field_of_another_server": 0}, "a_field_of_another_server"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/tokenize", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ):
        assert refused(http, path, **fields)["param"] == param
    assert refused(http, CHAT, 422, documents=[{"text": "x"}])["param"] == "documents"


def test_turns_as_clients_send_them_back(http: httpx.Client) -> None:
    empty = {"annotations": [], "refusal": None, "audio": None, "tool_calls": []}
    again = {"role": "user", "content": "Again!"}
    expected = chat(http, USER, {"role": "assistant", "content": "Paris."}, again)
    for turn in ({"content": "Paris.", **empty}, {"content": "Paris.", "reasoning": "Hm."}):
        assert chat(http, USER, {"role": "assistant", **turn}, again) == expected
    part = {"type": "text", "text": USER["content"], "cache_control": None}
    assert chat(http, {"role": "user", "content": [part]}) == chat(http)
    silent = chat(http, USER, {"role": "assistant", "content": ""}, again)
    assert chat(http, USER, {"role": "assistant", "content": None}, again) == silent


# ---- numbers ----


def test_numbers_however_they_are_written(http: httpx.Client) -> None:
    expected = complete(http, max_tokens=5, n=1, logit_bias={"7": 1.0}, stop_token_ids=[4, 5])
    assert expected == complete(
        http, max_tokens=5.0, n="1", temperature="0.0", logit_bias={"7": 1},
        stop_token_ids=[4.0, 5],
    )  # fmt: skip
    ids = http.post("/tokenize", json={"prompt": FRANCE}).json()["tokens"]
    for prompt in (list(map(float, ids)), [list(map(float, ids))]):
        assert complete(http, prompt=prompt)["text"] == complete(http)["text"]
    assert complete(http, stop="5", max_tokens=1)["finish_reason"] == "length"  # text stays text
    for field, value in (
        ("max_tokens", 5.5), ("max_tokens", "5.5"), ("max_tokens", "five"), ("max_tokens", True),
        ("max_tokens", "-1"), ("temperature", "hot"), ("temperature", ""), ("temperature", "nan"),
        ("stream", "true"), ("logprobs", [1]), ("max_tokens", 1e300), ("max_tokens", "9" * 9000),
        ("n", 10**400), ("best_of", 10**400), ("temperature", "1." + "0" * 9000),
    ):  # fmt: skip
        assert refused(http, COMPLETIONS, **{field: value})["param"] == field, value


def test_a_bias_beyond_a_hundred_is_a_hundred(http: httpx.Client) -> None:
    most = complete(http, max_tokens=4, logit_bias={"7": 100}, return_token_ids=True)
    assert most["token_ids"] == [7] * 4
    assert complete(http, max_tokens=4, logit_bias={"7": 1e9}, return_token_ids=True) == most
    (paris, *_) = complete(http, return_token_ids=True)["token_ids"]
    banned = complete(http, logit_bias={str(paris): -1000}, return_token_ids=True)["token_ids"]
    assert (
        banned == complete(http, logit_bias={str(paris): -100}, return_token_ids=True)["token_ids"]
    )
    assert paris not in banned


def test_all_logprobs_where_max_logprobs_is_the_vocabulary(http: httpx.Client) -> None:
    shown = complete(http, logprobs=-1, max_tokens=2)["logprobs"]["top_logprobs"]
    (top,) = http.post(
        CHAT, json={"messages": [USER], "logprobs": True, "top_logprobs": -1, "max_tokens": 1}
    ).json()["choices"][0]["logprobs"]["content"]
    assert len(top["top_logprobs"]) == 4096 and len(shown) == 2
    error = refused(http, COMPLETIONS, logprobs=4097)
    assert error["message"] == "logprobs must be at most max_logprobs (4096), got 4097"


# ---- what vLLM has null ----


def test_what_nobody_asked_for_can_be_read(client: openai.OpenAI) -> None:
    completion: Any = client.completions.create(model=EMBEDDED_MODEL, prompt=FRANCE)
    (choice,) = completion.choices
    assert choice.prompt_logprobs is choice.prompt_token_ids is choice.token_ids is None
    assert choice.stop_reason is None and choice.logprobs is None
    for chunk in client.completions.create(model=EMBEDDED_MODEL, prompt=FRANCE, stream=True):
        part: Any = chunk.choices[0]
        assert part.stop_reason is part.token_ids is part.prompt_token_ids is None
    answer: Any = client.chat.completions.create(model=EMBEDDED_MODEL, messages=[USER])  # type: ignore[list-item]
    assert answer.prompt_logprobs is answer.prompt_token_ids is None
    assert answer.choices[0].token_ids is answer.choices[0].stop_reason is None
    assert answer.choices[0].message.reasoning is answer.choices[0].message.refusal is None
