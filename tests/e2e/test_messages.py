"""/v1/messages with Anthropic's client: blocks, streams whose fold is the whole answer, and turns
that go back as they came."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from router import answers, hosted, typed
from router.sealed import unseal
from tests.support.scripted_chats import ANSWERS, ARGUMENTS, MODEL, THOUGHT, save_chats
from tests.support.server import Server, serving
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests/e2e/recorded/claude_code.json"
KEY = "sesame"
TOOLS: list[Any] = [
    {
        "name": "get_weather",
        "description": "The weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
        "cache_control": {"type": "ephemeral"},
    },
    {
        "name": "look_up",
        "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}},
        "type": "custom",
    },
]
ENABLED: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = save_chats(tmp_path_factory.mktemp("scripted"))
    router = {"served_model_name": [MODEL], "api_key": [KEY]}
    with serving(router, str(folder), dtype="float32") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def user(content: Any) -> Any:
    return {"role": "user", "content": content}


def fields_of(words: Any, fields: dict[str, Any]) -> dict[str, Any]:
    messages = [user(words)] if isinstance(words, str) else words
    return {"model": MODEL, "max_tokens": 500, "messages": messages, **fields}


def ask(client: anthropic.Anthropic, words: Any, **fields: Any) -> anthropic.types.Message:
    message: anthropic.types.Message = client.messages.create(**fields_of(words, fields))
    return message


def bare(message: anthropic.types.Message) -> dict[str, Any]:
    """What two answers to the same request have in common: all but what is drawn or cached."""
    values = message.model_dump(exclude={"id": True, "usage": True})
    for block in values["content"]:
        block.pop("id", None)
        for name in ("citations", "parsed_output"):
            assert block.pop(name, None) is None
    return values


def both(
    client: anthropic.Anthropic, words: Any, **fields: Any
) -> tuple[anthropic.types.Message, list[Any]]:
    """The answer, and the events of a stream that folds to it."""
    whole = ask(client, words, **fields)
    with client.messages.stream(**fields_of(words, fields)) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert bare(final) == bare(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert length(final) == length(whole) > 0
    return whole, events


def length(message: anthropic.types.Message) -> int:
    """Of the prompt, in tokens."""
    return message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_text(client: anthropic.Anthropic) -> None:
    whole, events = both(client, "hello")
    assert text_of(whole) == ANSWERS["hello"] and whole.stop_reason == "end_turn"
    raw = client.messages.create(**fields_of("hello", {"stream": True}))
    types = [event.type for event in raw]
    assert types[:2] == ["message_start", "content_block_start"]
    assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(types[2:-3]) == {"content_block_delta"}
    blocks = [{"type": "text", "text": "say", "cache_control": {"type": "ephemeral"}},
              {"type": "text", "text": "hello"}]  # fmt: skip
    assert text_of(ask(client, [user(blocks)], system="Be brief.")) == ANSWERS["hello"]


def test_a_call(client: anthropic.Anthropic) -> None:
    whole, events = both(client, "weather", tools=TOOLS)
    text, call = whole.content
    assert text.type == "text" and text.text == "Let me look."
    assert call.type == "tool_use" and (call.name, call.input) == ("get_weather", ARGUMENTS)
    assert whole.stop_reason == "tool_use" and whole.stop_sequence is None
    assert [e.snapshot for e in events if e.type == "input_json"][-1] == ARGUMENTS


def test_thinking(client: anthropic.Anthropic) -> None:
    whole, events = both(client, "think", thinking=ENABLED)
    thinking, text = whole.content
    assert thinking.type == "thinking" and thinking.thinking == THOUGHT and thinking.signature
    assert text.type == "text" and text.text == "Good morning."
    assert [e.type for e in events if e.type in ("thinking", "signature")][-1] == "signature"
    assert whole.usage.output_tokens_details
    assert whole.usage.output_tokens_details.thinking_tokens > 0
    omitted, events = both(client, "think", thinking={"type": "adaptive", "display": "omitted"})
    block = omitted.content[0]
    assert block.type == "thinking" and block.thinking == "" and unseal(block.signature) == THOUGHT
    assert not [event for event in events if event.type == "thinking"]


def test_thinking_has_a_budget(client: anthropic.Anthropic) -> None:
    few: Any = {"type": "enabled", "budget_tokens": 2}
    fields: Any = {"max_tokens": 14, "extra_body": {"temperature": 0}}
    block = both(client, "think", thinking=few, **fields)[0].content[0]
    assert block.type == "thinking" and block.thinking != THOUGHT
    assert THOUGHT.startswith(block.thinking)
    assert text_of(ask(client, "hello", thinking=few)) == ANSWERS["hello"]


def test_the_template_hears_of_thinking(client: anthropic.Anthropic) -> None:
    def tokens(**fields: Any) -> int:
        return client.messages.count_tokens(
            model=MODEL, messages=[user("hello")], **fields
        ).input_tokens

    off = tokens()
    assert off == tokens(thinking={"type": "disabled"}, output_config={"effort": "high"})
    on = tokens(thinking={"type": "adaptive"})
    assert on == tokens(thinking=ENABLED) == off - 1  # "True" is shorter than "False"
    assert tokens(thinking=ENABLED, output_config={"effort": "high"}) > on
    assert tokens() == length(ask(client, "hello"))


def test_calls_that_are_asked_for(client: anthropic.Anthropic) -> None:
    greedy: Any = {"tools": TOOLS, "max_tokens": 60, "extra_body": {"temperature": 0}}
    named: Any = {"type": "tool", "name": "look_up"}
    call = both(client, "ponder", tool_choice=named, **greedy)[0].content[-1]
    assert call.type == "tool_use" and call.name == "look_up"
    for choice in (named, {"type": "any"}):  # what is no call must not be said
        assert not text_of(ask(client, "hello", tool_choice=choice, **greedy))
    assert text_of(ask(client, "hello", tools=TOOLS)) == ANSWERS["hello"]
    quiet = ask(client, "weather", tools=TOOLS, tool_choice={"type": "none"})
    assert text_of(quiet) == ANSWERS["weather"]
    assert len(ask(client, "two", tools=TOOLS).content) == 2
    one: Any = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(ask(client, "two", tools=TOOLS, tool_choice=one).content) == 1


def test_the_turns_go_back(client: anthropic.Anthropic) -> None:
    """As the client's own objects, or as dicts; results as strings, blocks and errors."""
    first = ask(client, "ponder", tools=TOOLS, thinking=ENABLED)
    hidden = ask(client, "ponder", tools=TOOLS, thinking={"type": "adaptive", "display": "omitted"})
    lengths = set()
    for content in (first.content, [b.model_dump() for b in first.content], hidden.content):
        call: Any = content[-1]
        id = call["id"] if isinstance(call, dict) else call.id
        for result in ("21", [{"type": "text", "text": "21"}]):
            results = user([{"type": "tool_result", "tool_use_id": id, "content": result}])
            turns = [user("ponder"), {"role": "assistant", "content": content}, results]
            answer = ask(client, turns, tools=TOOLS, thinking=ENABLED)
            assert text_of(answer) == ANSWERS["result"]
            lengths.add(length(answer))
    assert len(lengths) == 1  # they are the same prompt
    results["content"][0]["is_error"] = True
    failed = ask(client, turns, tools=TOOLS, thinking=ENABLED)
    assert length(failed) == lengths.pop() + len("Error: \n")
    # What the user says with the result comes after it.
    results["content"].append({"type": "text", "text": "hello"})
    assert text_of(ask(client, turns, tools=TOOLS)) == ANSWERS["hello"]


def test_an_answer_that_goes_on(client: anthropic.Anthropic) -> None:
    begun = {"role": "assistant", "content": "It is"}
    plain = client.messages.count_tokens(model=MODEL, messages=[user("hello")]).input_tokens
    more = client.messages.count_tokens(model=MODEL, messages=[user("hello"), begun])  # type: ignore[list-item]
    assert more.input_tokens < plain + len("<|assistant|>It is")
    assert ask(client, [user("hello"), begun], max_tokens=4).stop_reason == "max_tokens"


def test_ends(client: anthropic.Anthropic) -> None:
    stopped, _ = both(client, "hello", stop_sequences=[", who"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", ", who")
    assert text_of(stopped) == "Hello to you"
    assert both(client, "hello", max_tokens=2)[0].stop_reason == "max_tokens"
    # As large as clients have it, for whatever model.
    assert ask(client, "hello", max_tokens=1 << 20, timeout=PATIENCE).stop_reason == "end_turn"


def test_systems_anywhere_and_the_prefix_cache(client: anthropic.Anthropic) -> None:
    def asked(version: int) -> anthropic.types.Message:
        billing = f"x-anthropic-billing-header: cc_version=1.{version}; cch={version:05x};"
        system = [{"type": "text", "text": text} for text in (billing, "Be brief. " * 40)]
        turns = [user("say hello"), {"role": "system", "content": "Mind the time."}]
        return ask(client, turns, system=system)

    first, second = asked(1), asked(22)
    assert text_of(first) == text_of(second) == ANSWERS["hello"]
    assert length(first) == length(second) > 400
    assert (second.usage.cache_read_input_tokens or 0) > 400 > second.usage.input_tokens


def test_hosted_tools(
    client: anthropic.Anthropic, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(hosted.log, "warning", lambda text, *values: told.append(text % values))
    hosted.warn.cache_clear()
    tools: Any = [{"type": "web_search_20260318", "name": "web_search"}, *TOOLS]
    assert ask(client, "weather", tools=tools).stop_reason == "tool_use"
    assert len(told) == 1 and "web_search_20260318" in told[0]
    monkeypatch.setattr(server.service, "config", replace(server.service.config, strict_tools=True))
    with pytest.raises(anthropic.BadRequestError, match="web_search_20260318"):
        ask(client, "weather", tools=tools)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [user([{"type": "image", "source": {}}])]}, r"messages\[0\].content\[0\]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role must be user"),
        ({"messages": [{"role": "assistant", "content": []}]}, "the last one must be a user's"),
        ({"tools": [{"name": "x y", "input_schema": {}}]}, "tools.*name must be"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"tool_choice": {"type": "tool"}}, "must have a name"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"system": [{"type": "image"}]}, r"system\[0\].type must be text"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"messages": [user("long " * 140_000)]}, "maximum context length"),
    ],
)
def test_what_is_wrong_is_named(
    client: anthropic.Anthropic, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        client.messages.create(**fields_of("hello", {"extra_body": fields}))
    assert caught.value.type == "invalid_request_error"


def test_errors_are_the_clients_own(client: anthropic.Anthropic, server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nobody") as missing:
        ask(client, "hello", model="nobody")
    assert missing.value.type == "not_found_error"
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    for call in (stranger.messages.create, stranger.messages.count_tokens):
        with pytest.raises(anthropic.AuthenticationError) as refused:
            call(**fields_of("hello", {}) if call == stranger.messages.create else
                 {"model": MODEL, "messages": [user("hello")]})  # type: ignore[operator]  # fmt: skip
        assert refused.value.type == "authentication_error"
    with pytest.raises(anthropic.NotFoundError) as absent:
        client.messages.batches.retrieve("batch")
    assert absent.value.type == "not_found_error"
    monkey = httpx.get(f"{server.url}/v1/messages", headers={"x-api-key": KEY})
    assert monkey.status_code == 405 and monkey.json()["type"] == "error"


def test_names_and_headers(client: anthropic.Anthropic, server: Server) -> None:
    """Clients name the provider's models for small tasks; ``beta`` and bearers pass."""
    answer = ask(client, "hello", model="claude-haiku-9")
    assert answer.model == "claude-haiku-9" and answer._request_id == answer.id
    assert answer.id.startswith("msg_")
    bearer = anthropic.Anthropic(base_url=server.url, auth_token=KEY, api_key=None, max_retries=0)
    beta = bearer.beta.messages.create(**fields_of("hello", {"betas": ["effort-2025-11-24"]}))
    assert beta.content[0].text == ANSWERS["hello"]  # type: ignore[union-attr]


def test_a_stream_that_fails(
    client: anthropic.Anthropic, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken for the test")

    monkeypatch.setattr(typed.TypedAnswer, "_parts", fail)
    with pytest.raises(anthropic.APIStatusError, match="failed on this request") as caught:
        list(client.messages.create(**fields_of("hello", {"stream": True})))
    assert caught.value.type == "api_error"
    server.assert_idle()


def test_a_long_call_is_no_silence(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SILENCE", 0.0)
    body = fields_of("weather", {"tools": TOOLS, "stream": True})
    text = httpx.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": KEY}).text
    assert text.count("event: ping\n") > 3


def test_claude_code(server: Server) -> None:
    """Claude Code 2.1.197 calls its shell and goes on. Recorded, with fewer tools
    and long texts cut short."""
    body = json.loads(RECORDED.read_text())
    url, headers = f"{server.url}/v1/messages?beta=true", {"x-api-key": KEY}
    first = {**body, "messages": body["messages"][:-2]}
    for request, kind in ((first, "tool_use"), (body, "text")):
        answer = httpx.post(url, json=request, headers=headers)
        assert answer.status_code == 200, answer.text
        data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        events = [json.loads(line) for line in data]
        begun = [e["content_block"] for e in events if e["type"] == "content_block_start"]
        assert [block["type"] for block in begun] == [kind]
        assert events[-1] == {"type": "message_stop"}
    usage = events[0]["message"]["usage"]
    assert usage["cache_read_input_tokens"] > 10 * usage["input_tokens"]
    count = {k: body[k] for k in ("model", "messages", "system", "tools", "thinking")}
    counted = httpx.post(f"{server.url}/v1/messages/count_tokens", json=count, headers=headers)
    assert counted.json()["input_tokens"] > 3000
