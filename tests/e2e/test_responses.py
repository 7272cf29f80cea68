"""/v1/responses with OpenAI's client: items, streams whose fold is the whole answer, and turns that
go back as they came."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response

from router import hosted
from router.typed import TypedAnswer
from tests.support.scripted_chats import ANSWERS, ARGUMENTS, MODEL, PATCH, THOUGHT, save_chats
from tests.support.server import Server, serving

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "tests/node"
RECORDED = ROOT / "tests/e2e/recorded/codex.json"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
PATCHES: dict[str, Any] = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
TEAM: dict[str, Any] = {
    "type": "namespace",
    "name": "team",
    "tools": [{"type": "function", "name": "spawn"}],
}
AT: Any = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK_UP = {"type": "function", "name": "look_up", "parameters": AT}
TOOLS: list[Any] = [WEATHER, PATCHES, TEAM, LOOK_UP]
SEALED: Any = ["reasoning.encrypted_content"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = save_chats(tmp_path_factory.mktemp("scripted"))
    with serving({"served_model_name": [MODEL]}, str(folder), dtype="float32") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, input: Any, **fields: Any) -> Response:
    answer: Response = client.responses.create(model=MODEL, input=input, **fields)
    return answer


def bare(response: Response) -> dict[str, Any]:
    """What two answers to the same request have in common: all but what is drawn or timed."""
    values = response.model_dump(exclude_unset=True)
    for name in ("id", "created_at", "completed_at", "usage"):
        values.pop(name)
    for item in values["output"]:
        item["id"] = item["id"].partition("_")[0]
        assert item.pop("call_id", "call_").startswith("call_")
    return values


def both(client: openai.OpenAI, input: Any, **fields: Any) -> tuple[Response, list[Any]]:
    """The answer, and the events of a stream that folds to it."""
    whole = ask(client, input, **fields)
    events = list(client.responses.create(model=MODEL, input=input, stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1].response
    assert events[-1].type == f"response.{last.status}" and bare(last) == bare(whole)
    assert events[0].response.id == last.id and whole.usage and last.usage
    assert last.usage.output_tokens == whole.usage.output_tokens
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.output
    for event in events:
        if hasattr(event, "item_id"):
            assert last.output[event.output_index].id == event.item_id
    return whole, events


def deltas(events: list[Any], kind: str) -> str:
    return "".join(e.delta for e in events if e.type == f"response.{kind}.delta")


def kinds(events: list[Any]) -> list[str]:
    """The types of events, without ``response.``, those that repeat once."""
    types = [event.type.removeprefix("response.") for event in events]
    return [t for t, before in zip(types, ["", *types], strict=False) if t != before]


def test_text(client: openai.OpenAI) -> None:
    whole, events = both(client, "hello")
    assert whole.output_text == deltas(events, "output_text") == ANSWERS["hello"]
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert whole.status == "completed" and whole.error is None
    parts = [{"type": "input_text", "text": "say"}, {"type": "input_text", "text": "hello"}]
    again = ask(client, [{"role": "user", "content": parts}], instructions="Be brief.")
    assert again.output_text == whole.output_text and again.instructions == "Be brief."


def test_a_call_after_thinking(client: openai.OpenAI) -> None:
    whole, events = both(client, "ponder", tools=TOOLS)
    reasoning, call = whole.output
    assert reasoning.type == "reasoning" and reasoning.content and not reasoning.summary
    assert reasoning.content[0].text == deltas(events, "reasoning_text")
    assert call.type == "function_call" and json.loads(call.arguments) == {"at": "sky"}
    assert call.arguments == deltas(events, "function_call_arguments")
    assert kinds(events)[2:-1] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done", "output_item.added",
        "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    assert whole.usage and whole.usage.output_tokens_details.reasoning_tokens > 0


LOGPROBS: Any = ["message.output_text.logprobs"]


@pytest.mark.parametrize("words", ["hello", "think", "weather"])
def test_log_probabilities_of_the_text(client: openai.OpenAI, words: str) -> None:
    """Of its tokens and no others; those of a stream's deltas are those of the whole."""
    fields: Any = {"tools": TOOLS, "include": LOGPROBS, "top_logprobs": 2}
    whole, events = both(client, words, **fields)
    (text,) = [item.content[0] for item in whole.output if item.type == "message"]
    assert text.type == "output_text" and text.logprobs and whole.top_logprobs == 2
    spelled = "".join(entry.token for entry in text.logprobs)
    assert text.text in spelled and len(spelled) < len(text.text) + 14  # a token's
    for entry in text.logprobs:
        assert len(entry.top_logprobs) == 2 and entry.logprob == entry.top_logprobs[0].logprob
        assert bytes(entry.bytes).decode() == entry.token
    told = [entry for e in events if e.type.endswith("output_text.delta") for entry in e.logprobs]
    (done,) = [e.logprobs for e in events if e.type.endswith("output_text.done")]
    assert [e.to_dict() for e in told] == [e.to_dict() for e in done]
    assert [e.to_dict() for e in done] == [e.to_dict() for e in text.logprobs]
    if words == "hello":
        (alone,) = ask(client, words, include=LOGPROBS).output
        assert alone.type == "message" and alone.content[0].type == "output_text"
        assert alone.content[0].logprobs and not alone.content[0].logprobs[0].top_logprobs
        (none,) = ask(client, words, top_logprobs=0).output
        assert none.type == "message" and none.content[0].type == "output_text"
        assert none.content[0].logprobs == []


def test_thinking_has_a_budget(client: openai.OpenAI) -> None:
    fields: Any = {"temperature": 0, "extra_body": {"thinking_token_budget": 2}}
    item = both(client, "think", max_output_tokens=14, **fields)[0].output[0]
    assert item.type == "reasoning" and item.content
    assert item.content[0].text != THOUGHT and THOUGHT.startswith(item.content[0].text)


def test_a_summary_is_the_thinking(client: openai.OpenAI) -> None:
    whole, events = both(client, "think", reasoning={"summary": "auto"}, include=SEALED)
    reasoning, message = whole.output
    assert reasoning.type == "reasoning" and reasoning.content is None
    assert reasoning.summary[0].text == deltas(events, "reasoning_summary_text") == THOUGHT
    assert kinds(events)[3:7] == [
        "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.done", "reasoning_summary_part.done",
    ]  # fmt: skip
    assert message.type == "message" and whole.output_text == "Good morning."


def test_several_calls_and_one(client: openai.OpenAI) -> None:
    whole, _ = both(client, "two", tools=TOOLS)
    assert [item.type for item in whole.output] == ["function_call"] * 2
    one, _ = both(client, "two", tools=TOOLS, parallel_tool_calls=False)
    assert len(one.output) == 1 and one.parallel_tool_calls is False


def test_calls_that_are_asked_for(client: openai.OpenAI) -> None:
    named = {"type": "function", "name": "look_up"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    greedy: Any = {"tools": TOOLS, "temperature": 0, "max_output_tokens": 60}
    for choice in (named, allowed):
        call = both(client, "ponder", tool_choice=choice, **greedy)[0].output[-1]
        assert call.type == "function_call" and call.name == "look_up"
    for choice in (named, allowed, "required"):  # what is no call must not be said
        assert not both(client, "hello", tool_choice=choice, **greedy)[0].output_text
    quiet, _ = both(client, "weather", tools=TOOLS, tool_choice="none")
    assert quiet.output_text == ANSWERS["weather"]


def test_custom_tools_and_namespaces(client: openai.OpenAI) -> None:
    (call,) = (answer := both(client, "patch", tools=TOOLS))[0].output
    assert call.type == "custom_tool_call" and call.name == "apply_patch" and call.input == PATCH
    assert deltas(answer[1], "custom_tool_call_input") == PATCH
    (call,) = both(client, "agent", tools=TOOLS)[0].output
    assert call.type == "function_call" and (call.namespace, call.name) == ("team", "spawn")


def test_the_items_go_back(client: openai.OpenAI, server: Server) -> None:
    """As the client's own objects, or as dicts; thinking as it was shown, or as it was sealed."""
    for words, kind in (("ponder", "function"), ("patch", "custom_tool"), ("agent", "function")):
        shown = ask(client, words, tools=TOOLS).output
        sealed = ask(client, words, tools=TOOLS, include=SEALED).output
        lengths = set()
        for items in (shown, [item.model_dump() for item in shown], sealed):
            result = {"type": f"{kind}_call_output", "call_id": items_id(items), "output": "21"}
            turns: list[Any] = [{"role": "user", "content": words}, *items, result]
            if items is sealed and words == "ponder":
                turns[1] = {"type": "reasoning", "summary": [], "id": "rs_1",
                            "encrypted_content": items[0].encrypted_content}  # fmt: skip
            answer = ask(client, turns, tools=TOOLS)
            assert answer.output_text == ANSWERS["result"] and answer.usage
            lengths.add(answer.usage.input_tokens)
        assert len(lengths) == 1  # they are the same prompt
    with_thought, without = (ask(client, [*turns], tools=TOOLS) for turns in thoughts(client))
    assert with_thought.usage and without.usage
    more = with_thought.usage.input_tokens - without.usage.input_tokens
    assert more > len("The sky must be asked.")


def items_id(items: list[Any]) -> str:
    last = items[-1]
    return str(last["call_id"] if isinstance(last, dict) else last.call_id)


def thoughts(client: openai.OpenAI) -> list[list[Any]]:
    """A turn with its thinking, and without."""
    reasoning, call = ask(client, "ponder", tools=TOOLS).output
    result = {"type": "function_call_output", "call_id": items_id([call]), "output": "21"}
    first = {"role": "user", "content": "ponder"}
    return [[first, reasoning, call, result], [first, call, result]]


def test_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    whole, events = both(client, "hello", max_output_tokens=2)
    assert whole.status == "incomplete" and events[-1].type == "response.incomplete"
    assert whole.incomplete_details and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output[0].status == "incomplete"  # type: ignore[union-attr]
    thinking, _ = both(client, "think", max_output_tokens=3)
    assert [item.type for item in thinking.output] == ["reasoning"]


def test_the_clients_helpers(client: openai.OpenAI) -> None:
    class Trip(pydantic.BaseModel):
        city: str

    parsed = client.responses.parse(model=MODEL, input="json", text_format=Trip)
    assert parsed.output_parsed == Trip(city="Oslo")
    assert parsed.text and parsed.text.format and parsed.text.format.type == "json_schema"
    with client.responses.stream(model=MODEL, input="json", text_format=Trip) as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_parsed == Trip(city="Oslo")
    assert snapshots[-1] == final.output_text
    with client.responses.stream(model=MODEL, input="weather", tools=[WEATHER]) as stream:  # type: ignore[list-item]
        call = stream.get_final_response().output[-1]
    assert call.type == "function_call" and json.loads(call.arguments) == ARGUMENTS


def test_what_changes_nothing(client: openai.OpenAI) -> None:
    fields: Any = {
        "store": True, "metadata": {"a": "b"}, "text": {}, "prompt_cache_key": "k", "user": "u",
        "service_tier": "auto", "truncation": "disabled", "background": False, "top_logprobs": 0,
        "safety_identifier": "s", "max_tool_calls": 3, "include": ["web_search_call.results"],
        "extra_body": {"client_metadata": {"x": "y"}, "previous_response_id": None},
    }  # fmt: skip
    answer = ask(client, "hello", **fields)
    assert answer.output_text == ANSWERS["hello"] and answer.metadata == {"a": "b"}
    other = ask(client, "hello", reasoning={"effort": "low"}, temperature=0.5, top_p=0.9)
    assert answer.usage and other.usage and (other.temperature, other.top_p) == (0.5, 0.9)
    assert other.usage.input_tokens > answer.usage.input_tokens  # the template shows the effort


def test_hosted_tools(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(hosted.log, "warning", lambda text, *values: told.append(text % values))
    hosted.warn.cache_clear()
    tools: Any = [{"type": "web_search"}, WEATHER]
    for _ in range(2):
        (_, call) = ask(client, "weather", tools=tools).output
        assert call.type == "function_call"
    assert len(told) == 1 and "web_search" in told[0]
    monkeypatch.setattr(server.service, "config", replace(server.service.config, strict_tools=True))
    with pytest.raises(openai.BadRequestError, match="web_search") as caught:
        ask(client, "weather", tools=tools)
    assert caught.value.param == "tools[0]"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps nothing"),
        ({"conversation": "conv_1"}, "conversation", "keeps nothing"),
        ({"background": True}, "background", "keeps nothing"),
        ({"prompt": {"id": "p"}}, "prompt", "keeps nothing"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "keeps no items"),
        ({"input": []}, "input", "at least one"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "function_call"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "developer"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
            "input_text",
        ),
        ({"input": [{"type": "function_call_output"}]}, "input[0].output", "string"),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "gAAAA"}]},
            "input[0].encrypted_content",
            "not made by this server",
        ),
        ({"truncation": "auto"}, "truncation", "auto"),
        ({"include": ["message.output_text.tokens"]}, "include[0]", "invalid enum"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "schema"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "no function"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "allowed_tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "string"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "get_weather"),
        ({"max_output_tokens": 1 << 20}, "input", "maximum context length"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
    ],
)
def test_what_is_wrong_is_named(
    client: openai.OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.responses.create(**{"model": MODEL, "input": "hello", "extra_body": fields})
    assert caught.value.param == param


def test_errors_are_the_clients_own(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.responses.create(model="nobody", input="hello")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")  # nothing is kept
    headers = {"X-Request-Id": "mine"}
    given = httpx.post(f"{server.url}/v1/responses", json={"input": "hello"}, headers=headers)
    assert given.json()["id"] == "resp_mine" and given.headers["x-request-id"] == "mine"


def test_a_stream_that_fails(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken for the test")

    monkeypatch.setattr(TypedAnswer, "_parts", fail)
    events = list(client.responses.create(model=MODEL, input="hello", stream=True))
    assert [event.type for event in events][-1] == "response.failed"
    response = events[-1].response  # type: ignore[union-attr]
    assert response.status == "failed" and response.error and response.error.code == "server_error"
    server.assert_idle()


def test_codex(client: openai.OpenAI, server: Server) -> None:
    """Codex CLI 0.171.0 calls its shell and goes on. Recorded, with fewer tools
    and long texts cut short."""
    body = json.loads(RECORDED.read_text())
    body["input"][-2]["call_id"] = body["input"][-1]["call_id"] = "call_1"
    first = {**body, "input": body["input"][:-2]}
    for request, expected in ((first, "function_call"), (body, "message")):
        answer = httpx.post(f"{server.url}/v1/responses", json=request)
        assert answer.status_code == 200, answer.text
        last = answer.text.rstrip().rpartition("\ndata: ")[2]
        response = json.loads(last)["response"]
        assert [item["type"] for item in response["output"]] == [expected]
        assert response["status"] == "completed" and response["usage"]["output_tokens"]
    assert response["usage"]["input_tokens_details"]["cached_tokens"] > 1000
    assert response["output"][0]["content"][0]["text"] == ANSWERS["result"]


def test_node(server: Server) -> None:
    """OpenAI's and Anthropic's clients for Node, and Vercel's AI SDK running a tool."""
    done = subprocess.run(
        ["node", "agents.mjs", server.url, MODEL], cwd=NODE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("events") < 1000
    assert found == {
        "items": ["reasoning", "function_call"],
        "streamedItems": ["reasoning", "function_call"],
        "blocks": ["thinking", "tool_use"],
        "streamedBlocks": ["thinking", "tool_use"],
        "input": {"at": "sky"},
        "stopReason": "tool_use",
        "error": ["NotFoundError", 404, "not_found_error"],
        "texts": [ANSWERS["result"]] * 4,
        "ran": ["sky"] * 4,
    }
