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
LONDON, TIME, JOKE = (
    [{"role": "user", "content": text}]
    for text in ("What is the weather in London?", "What time is it?", "Tell me a joke.")
)
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


def tool(name: str, strict: bool | None = None, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    function = {"name": name, "parameters": schema | {"additionalProperties": False}}
    return {"type": "function", "function": function | ({"strict": strict} if strict else {})}


CITY, DAYS = (
    {"enum": ["Paris", "Rome"]},
    {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
)
TOOLS = [tool("get_weather", city=CITY, days=DAYS), tool("get_time")]


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    "messages, choice, called",
    [
        (LONDON, "required", "get_weather"),  # a city that the schema does not have
        (TIME, "required", "get_time"),
        (TIME, NAMED, "get_weather"),
    ],
)
def test_calls_that_are_asked_for_are_of_their_schema(
    client: openai.OpenAI, messages: Any, choice: Any, called: str
) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": messages, "tools": TOOLS, "tool_choice": choice, "n": 6,
        "temperature": 1.5, "seed": 3, "max_tokens": 300, "parallel_tool_calls": False,
    }  # fmt: skip
    found = []
    for one in client.chat.completions.create(**asked).choices:
        (call,) = one.message.tool_calls or []
        assert one.finish_reason == "tool_calls" and not one.message.content
        schema = next(t for t in TOOLS if t["function"]["name"] == call.function.name)
        jsonschema.validate(json.loads(call.function.arguments), schema["function"]["parameters"])
        found.append((call.function.name, call.function.arguments))
    streamed = [("", "")] * 6
    for chunk in client.chat.completions.create(**asked, stream=True):
        for part in chunk.choices:
            for delta in part.delta.tool_calls or []:
                name, text = streamed[part.index]
                name += delta.function.name or ""
                streamed[part.index] = name, text + (delta.function.arguments or "")
    assert streamed == found
    assert {name for name, _ in found} == {called}
    assert (len(set(found)) > 1) == (called == "get_weather")  # get_time takes no arguments


def test_strict_tools_that_are_pydantic_models(client: openai.OpenAI) -> None:
    class Weather(BaseModel):
        city: Literal["Paris", "Rome"]
        days: list[Literal[1, 2]] = Field(max_length=2)

    asked: Any = {"tools": [openai.pydantic_function_tool(Weather, name="get_weather")],
                  "model": MODEL, "temperature": 0}  # fmt: skip
    answer = client.chat.completions.parse(messages=LONDON, tool_choice="required", **asked)
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    free = client.chat.completions.parse(messages=JOKE, **asked)
    assert free.choices[0].message.content and not free.choices[0].message.tool_calls


def test_a_form_is_for_what_is_no_call(client: openai.OpenAI) -> None:
    def ask(messages: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, response_format=json_schema(SCHEMA),  # type: ignore[call-overload]
            temperature=0, max_tokens=300,
        ).choices[0]  # fmt: skip

    assert ask(LONDON).finish_reason == "tool_calls"
    told = ask(JOKE)
    assert told.finish_reason == "stop" and not told.message.tool_calls
    jsonschema.validate(json.loads(told.message.content), SCHEMA)


@pytest.mark.parametrize(
    "made, named",
    [
        (tool("f", True, a={"type": "array", "uniqueItems": True}), "of f: .*uniqueItems"),
        (tool("f", True, a={"type": "string", "format": "nope"}), "of f: .*nope"),
        ({"type": "function", "function": {"name": "f", "strict": True,
                                           "parameters": {"type": "array"}}}, "must be object"),
    ],
)  # fmt: skip
def test_a_strict_tool_that_cannot_be_enforced_is_named(
    client: openai.OpenAI, made: Any, named: str
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": [*TOOLS, made]}
    with pytest.raises(openai.BadRequestError, match=named) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.param == "tools[2].function.parameters"
    made["function"]["strict"] = False
    assert client.chat.completions.create(**asked, max_tokens=3).choices


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
