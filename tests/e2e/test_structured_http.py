"""``response_format`` and ``structured_outputs`` through real clients."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.support.server import Server, serving

MODEL = "manta-demo"
USER = [{"role": "user", "content": "Tell me about Ann."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip
HOSTILE = "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "a"'


class Person(BaseModel):
    """What ``parse`` asks for."""

    name: str = Field(max_length=20)
    kind: Literal["cat", "dog"]
    years: list[int] = Field(max_length=3)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=USER, response_format=Person, temperature=1, seed=1, max_tokens=300
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_chats_in_json_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": USER, "temperature": 1, "seed": 5, "max_tokens": 200, "n": 2,
        "response_format": json_schema(SCHEMA),
    }  # fmt: skip
    whole = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    for text in whole:
        jsonschema.validate(json.loads(text or ""), SCHEMA)
    parts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == whole


def test_any_json_object(client: openai.OpenAI) -> None:
    for form in ({"type": "json_object"}, json_schema({}) | {}):
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, temperature=0, max_tokens=300, response_format=form
        )
        if answer.choices[0].finish_reason == "stop":
            found = json.loads(answer.choices[0].message.content or "")
            assert form["type"] == "json_schema" or isinstance(found, dict)


@pytest.mark.parametrize(
    "asked, form",
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": r"\d{3}-\d{4}"}, r"\d{3}-\d{4}"),
        ({"grammar": 'root ::= "a" ("," "a")? "."'}, r"a(,a)?\."),
        ({"json": json.dumps({"const": [1, 2]}), "disable_any_whitespace": True}, r"\[1,2\]"),
        ({"json": {"enum": [1, 2]}, "regex": None}, "[12]"),
    ],
    ids=str,
)
def test_completions_of_every_form(client: openai.OpenAI, asked: dict[str, Any], form: str) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["The answer is", "Hello"], temperature=1, seed=3, max_tokens=60,
        extra_body={"structured_outputs": asked}, logprobs=2,
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and re.fullmatch(form, choice.text), choice.text


@pytest.mark.parametrize(
    "fields, param, named",
    [
        ({"response_format": json_schema({"uniqueItems": True})}, "response_format", "uniqueItems"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs", "not"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs",
         "got json and regex"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "unknown field"),
        ({"structured_outputs": {"grammar": HOSTILE}}, "structured_outputs", "complex|too big"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         None, "cannot be had together"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "structured_outputs", "ends"),
        ({"guided_json": SCHEMA}, "guided_json", "structured_outputs.json takes its place"),
        ({"guided_regex": "a"}, "guided_regex", "structured_outputs.regex takes its place"),
        ({"structural_tag": "{}"}, "structural_tag", "structured_outputs.structural_tag takes"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_cannot_be_had_is_a_400_that_names_it(
    http: httpx.Client, fields: dict[str, Any], param: str | None, named: str
) -> None:
    for path, prompt in (
        ("chat/completions", {"messages": USER}),
        ("completions", {"prompt": "a"}),
    ):
        answer = http.post(f"/v1/{path}", json={**prompt, "max_tokens": 5, **fields})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param and re.search(named, error["message"]), error


def test_what_asks_for_nothing_passes(http: httpx.Client) -> None:
    for fields in (
        {"response_format": {"type": "text"}}, {"response_format": {}}, {"structured_outputs": {}},
        {"structured_outputs": {"json": None}, "response_format": None}, {"guided_json": None},
    ):  # fmt: skip
        answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, **fields})
        assert answer.status_code == 200, answer.text


def test_hostile_grammars_hold_nobody_up(http: httpx.Client, server: Server) -> None:
    """While they are tried, and their process dies, other requests are answered."""
    plain = {"prompt": "The capital of France is", "max_tokens": 40, "temperature": 0}
    expected = http.post("/v1/completions", json=plain).json()["choices"]
    found: list[int] = []

    def hostile(number: int) -> None:
        grammar = HOSTILE.replace('"a"', f'"a{number}"')
        body = {"prompt": "a", "structured_outputs": {"grammar": grammar}}
        found.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=hostile, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert http.post("/v1/completions", json=plain).json()["choices"] == expected
    for thread in threads:
        thread.join()
    assert found == [400] * 2
    server.assert_idle()
