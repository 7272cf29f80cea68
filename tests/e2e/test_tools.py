"""Tools and reasoning through the clients that people have, with a model that writes what it is
told in Qwen3's format: whole, as a stream, and over several turns."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from canitoolcall.probe import probe
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

from deploy.cli import main
from router import answers
from tests.support.scripted_model import save_scripted
from tests.support.server import Server, serving

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "tests/node"
MODEL = "scripted"
CITIES = '{"city": "Paris", "days": [1, 2]}'
SCRIPTS = {
    "<|say:weather|>": "Let me look.\n<tool_call>\n"
    f'{{"name": "get_weather", "arguments": {CITIES}}}\n</tool_call>',
    "<|say:two|>": '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>\n'
    '<tool_call> {"arguments": {"city": "Rome"}, "name": "get_weather"} </tool_call>',
    "<|say:hello|>": "Hello to you, who ask!",
    "<|say:result|>": "It is 21 degrees there.",
    "<|say:think|>": "<think>\nA greeting, so I greet.\n</think>\n\nGood morning.",
    "<|say:broken|>": "<tool_call>\nthis is not any JSON at all\n</tool_call>",
    "<think>\n": "Opened for me already, fine.</think>And here is what I say.",
}


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# What the conformance suite's probe asks, by its last words, and what the model is to say.
PROBED = {
    "the weather in Paris?": called("get_weather", city="Paris"),
    "now? Use the tool.": called("get_weather", city="Paris"),
    "in this single turn.": called("get_weather", city="Paris ")
    + "\n"
    + called("get_weather", city="Tokyo"),
    "do not use any tool.": "42",
    "Berlin, room 4.12.": called(
        "create_event",
        title="Design review",
        start="2026-10-01T15:00:00Z",
        attendees=[{"name": n, "email": f"{n.lower()}@example.com"} for n in ("Ana", "Bo")],
        location={"city": "Berlin", "room": "4.12"},
    ),
    "— naïve résumé 🚀": called(
        "save_note", title="Grüße aus Zürich", body="Café ☕ in 東京 — naïve résumé 🚀"
    ),
    "server? Use the tool.": called("get_server_time"),
    "record_answer tool.": "<think>\n9.9 is larger.\n</think>\n\n"
    + called("record_answer", answer="9.9"),
}
SCRIPTS |= {f"<|say:probe{i}|>": text for i, text in enumerate(PROBED.values())}
SAY = {ending[-16:]: f"probe{i}" for i, ending in enumerate(PROBED)}
TEMPLATE = (
    f"{{%- set say = {SAY!r} %}}"
    """\
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- if message.reasoning_content %}<reason>{{ message.reasoning_content }}</reason>{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", ' }}
{%- for key, value in call.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}
{%- if reasoning_effort %}<effort>{{ reasoning_effort }}</effort>{% endif %}
{%- set last = messages[-1] %}
{{- '<|say:' }}
{%- if last.role == 'tool' %}result
{%- else %}{{ say.get(last.content[-16:], last.content) }}{% endif %}
{{- '|>' }}
{%- if enable_thinking is defined and enable_thinking %}{{ '<think>\\n' }}{% endif %}
{%- endif %}"""
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            "strict": False,
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = save_scripted(tmp_path_factory.mktemp("scripted"), SCRIPTS, TEMPLATE)
    with serving({"served_model_name": [MODEL]}, str(folder), dtype="float32") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def whole(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    fields = {"model": MODEL, "messages": ask(text), **fields}
    return client.chat.completions.create(**fields).choices[0]


def streamed(client: openai.OpenAI, text: str, **fields: Any) -> dict[str, Any]:
    """What the deltas of a stream add up to."""
    fields = {"model": MODEL, "messages": ask(text), "stream": True, **fields}
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "reason": None}
    for chunk in client.chat.completions.create(**fields):
        (choice,) = chunk.choices
        delta: Any = choice.delta
        found["content"] += delta.content or ""
        thought = getattr(delta, "reasoning_content", None)
        assert thought == getattr(delta, "reasoning", None)
        found["reasoning"] += thought or ""
        for call in delta.tool_calls or []:
            assert type(call.index) is int
            if call.index == len(found["calls"]):
                found["calls"].append([call.id, call.function.name, ""])
            found["calls"][call.index][2] += call.function.arguments
        found["reason"] = choice.finish_reason or found["reason"]
    return found


def both(client: openai.OpenAI, text: str, **fields: Any) -> dict[str, Any]:
    """What a whole answer has, which is what the stream has; without the ids of calls."""
    choice, stream = whole(client, text, **fields), streamed(client, text, **fields)
    message = choice.message
    assert message.reasoning == message.reasoning_content
    calls = message.tool_calls or []
    assert all(call.id.startswith("call_") and call.type == "function" for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    found = {
        "content": message.content or "",
        "reasoning": message.reasoning_content or "",
        "calls": [(call.function.name, json.loads(call.function.arguments)) for call in calls],
        "reason": choice.finish_reason,
    }
    assert all(id.startswith("call_") for id, _, _ in stream["calls"])
    stream["calls"] = [(name, json.loads(text)) for _, name, text in stream["calls"]]
    assert stream == found
    return found


WEATHER = ("get_weather", {"city": "Paris", "days": [1, 2]})


def test_a_call(client: openai.OpenAI) -> None:
    found = both(client, "weather", tools=TOOLS)
    assert found == {
        "content": "Let me look.", "reasoning": "", "calls": [WEATHER], "reason": "tool_calls"
    }  # fmt: skip
    assert whole(client, "two", tools=TOOLS).message.content is None
    for fields in ({"logprobs": True, "top_logprobs": 1}, {"temperature": 1.5, "seed": 3}):
        assert both(client, "weather", tools=TOOLS, **fields) == found
    assert both(client, "weather", tools=TOOLS, tool_choice="auto", stop=["no such"]) == found


def test_several_calls_and_one(client: openai.OpenAI) -> None:
    found = both(client, "two", tools=TOOLS)
    assert found["calls"] == [("get_time", {}), ("get_weather", {"city": "Rome"})]
    assert found["content"] == ""
    one = both(client, "two", tools=TOOLS, parallel_tool_calls=False)
    assert one["calls"] == found["calls"][:1] and one["reason"] == "tool_calls"


def test_text_and_no_call(client: openai.OpenAI) -> None:
    for fields in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}):
        found = both(client, "hello", **fields)
        assert found["content"] == SCRIPTS["<|say:hello|>"] and found["reason"] == "stop"
    # Without tools nobody asked for calls: what looks like one is text.
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        found = both(client, "weather", **fields)
        assert found["content"] == SCRIPTS["<|say:weather|>"] and not found["calls"]
    broken = both(client, "broken", tools=TOOLS)
    assert broken["content"] == SCRIPTS["<|say:broken|>"] and broken["reason"] == "stop"


def test_a_call_that_is_cut_off_is_none(client: openai.OpenAI) -> None:
    for most in range(3, 9):
        found = both(client, "weather", tools=TOOLS, max_tokens=most)
        assert not found["calls"] and found["reason"] == "length", most
        assert found["content"].rstrip() == "Let me look."


def test_reasoning(client: openai.OpenAI) -> None:
    found = both(client, "think")
    assert found["reasoning"] == "A greeting, so I greet."
    assert found["content"] == "Good morning." and found["reason"] == "stop"
    cut = both(client, "think", max_tokens=3)
    assert cut["reasoning"] and cut["content"] == "" and cut["reason"] == "length"
    assert whole(client, "think", max_tokens=3).message.content is None
    silent = both(client, "think", extra_body={"include_reasoning": False})
    assert silent["reasoning"] == "" and silent["content"] == "Good morning."
    opened = {"chat_template_kwargs": {"enable_thinking": True}}
    found = both(client, "hello", extra_body=opened)
    assert found["reasoning"] == "Opened for me already, fine."
    assert found["content"] == "And here is what I say."
    # A form that is asked for is that of what comes after the thinking.
    for text, fields in (("think", {}), ("hello", opened)):
        body = fields | {"structured_outputs": {"regex": r"[A-Z][a-z I]+\."}}
        found = both(client, text, extra_body=body)
        assert found["reasoning"] and found["content"][-4:] in ("ing.", "say."), found


def test_the_template_hears_of_effort(server: Server, client: openai.OpenAI) -> None:
    def tokens(**fields: Any) -> int:
        usage = client.chat.completions.create(
            model=MODEL, messages=ask("hello"), **fields
        ).usage  # fmt: skip
        assert usage is not None
        return usage.prompt_tokens

    assert tokens(reasoning_effort="low") > tokens()
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        tokens(reasoning_effort="enormous")


def test_the_turns_go_back(client: openai.OpenAI, server: Server) -> None:
    """As the SDK's own messages, as dicts with a null content, with parts, and with reasoning."""
    message = whole(client, "weather", tools=TOOLS).message
    call = message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
    as_parts = result | {"content": [{"type": "text", "text": "21"}]}
    plain = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    developer = {"role": "developer", "content": "Be brief."}
    for turns in (
        [message, result], [plain, as_parts], [plain | {"reasoning_content": "Hm."}, result],
        [plain | {"reasoning": "Hm."}, result],
    ):  # fmt: skip
        messages = [developer, *ask("weather"), *turns]
        assert (
            both(client, "", tools=TOOLS, messages=messages)["content"]
            == (SCRIPTS["<|say:result|>"])
        )
    body = {"model": MODEL, "tools": TOOLS, "messages": [*ask("weather"), plain, result]}
    shown = httpx.post(f"{server.url}/tokenize", json=body).json()
    prompt = httpx.post(f"{server.url}/detokenize", json={"tokens": shown["tokens"]}).json()
    assert "city=Paris;" in prompt["prompt"] and '"strict": false' in prompt["prompt"]


def test_the_probe_of_the_conformance_suite(server: Server) -> None:
    report = probe(f"{server.url}/v1", MODEL, concurrency=1)
    assert [(o.scenario_id, o.detail) for o in report.outcomes if o.status != "pass"] == []
    assert len(report.outcomes) == 27


def test_a_long_call_is_no_silence(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "SILENCE", 0.0)
    body = {"messages": ask("weather"), "tools": TOOLS, "stream": True}
    text = httpx.post(f"{server.url}/v1/chat/completions", json=body).text
    events = text.split("\n\n")
    assert sum(event.startswith(":") for event in events) > 3
    assert all(event.startswith(("data: ", ": ")) for event in events if event)
    assert both(client, "weather", tools=TOOLS)["calls"] == [WEATHER]


def test_the_terminal_shows_what_the_model_thinks(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "-q", "think", "--url", f"{server.url}/v1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Good morning.\n" and "A greeting, so I greet.\n\n" in shown.err


def test_fields_that_are_harmless(client: openai.OpenAI) -> None:
    fields = {
        "store": True, "metadata": {"a": "b"}, "service_tier": "flex", "verbosity": "low",
        "prediction": {"type": "content", "content": "Hello"}, "parallel_tool_calls": True,
    }  # fmt: skip
    assert whole(client, "hello", **fields).message.content == SCRIPTS["<|say:hello|>"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {}}}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        whole(client, "hello", **fields)
    assert caught.value.param == param


def test_marks_that_are_special_tokens(tmp_path: Path) -> None:
    """The client sees neither them nor other special tokens, unless it asks for those."""
    said = "Let me[PAD] look.[TOOL_CALLS]get_weather[ARGS]" + CITIES
    thought = "<think>I wonder at length what that is.</think>So I say."
    template = "{% if tools %}[TOOL_CALLS][ARGS]{{ tools | tojson }}{% endif %}{# <think> #}"
    template += "<|say:{{ messages[-1].content }}|>"
    special = ("[TOOL_CALLS]", "[ARGS]", "[PAD]", "<think>", "</think>")
    folder = save_scripted(tmp_path, {"<|say:x|>": said, "<|say:y|>": thought}, template, special)
    with serving({"served_model_name": [MODEL]}, str(folder), dtype="float32") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        plain = both(client, "x")
        assert plain["content"] == said.replace("[PAD]", "").replace("[TOOL_CALLS]", "").replace(
            "[ARGS]", ""
        )
        found = both_of_mistral(client, {})
        assert found == ("Let me look.", [WEATHER])
        found = both_of_mistral(client, {"extra_body": {"skip_special_tokens": False}})
        assert found == ("Let me[PAD] look.", [WEATHER])
        check_bounded_thinking(client, thought)


def check_bounded_thinking(client: openai.OpenAI, said: str) -> None:
    """It ends after so many tokens, and the model goes on as after an end of its own."""
    whole_thought = said.removeprefix("<think>").partition("</think>")[0]
    seen = []
    for most in (0, 1, 2, 999, -1):
        bound = {"thinking_token_budget": most}
        for form in ({}, {"structured_outputs": {"regex": r"[A-Z][a-z I]+\."}}):
            found = both(client, "y", extra_body=bound | form)
            assert found["content"] == "So I say." and found["reason"] == "stop"
        assert whole_thought.startswith(found["reasoning"])
        seen.append(found["reasoning"])
    assert seen[0] == "" and seen[0] < seen[1] < seen[2] < seen[3] == seen[4] == whole_thought
    two = client.chat.completions.create(
        model=MODEL, messages=ask("y"), n=2, extra_body={"thinking_token_budget": 1}
    )
    assert [choice.message.reasoning for choice in two.choices] == [seen[1]] * 2


def test_a_checkpoint_that_says_itself_how_it_writes(tmp_path: Path) -> None:
    said = f'Let me look.\n<<call>>{{"name": "get_weather", "arguments": {CITIES}}}<</call>>'
    shape = {"type": "function", "function": "{content}"}
    calls = {"open": "<<call>>", "close": "<</call>>", "content": "json", "transform": shape}
    own = {"start_anchor": "x", "fields": {"tool_calls": calls | {"repeats": True}}}
    template = "{{ tools }}<|say:{{ messages[-1].content }}|>"
    scripts = {"<|say:x|>": said, 'get_weather", "arguments":': f" {CITIES}}}<</call>>"}
    folder = save_scripted(tmp_path, scripts, template, response_template=own)
    with serving({"served_model_name": [MODEL]}, str(folder), dtype="float32") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        found = both(client, "x", tools=TOOLS)
        assert (found["content"], found["calls"]) == ("Let me look.", [WEATHER])
        whole(client, "x", extra_body={"thinking_token_budget": None})
        with pytest.raises(openai.BadRequestError, match="not known how .* thinking") as error:
            whole(client, "x", extra_body={"thinking_token_budget": 5})
        assert error.value.param == "thinking_token_budget"
        body: Any = {"messages": ask("x"), "max_tokens": 50}  # what does not think is in bounds
        body["thinking"] = {"type": "enabled", "budget_tokens": 5}
        answer: Any = client.post("/messages", cast_to=object, body=body)
        assert answer["content"][0]["text"].startswith("Let me look.")
        # Its prompt can begin a call, but no grammar is made of its template.
        named: Any = {"type": "function", "function": {"name": "get_weather"}}
        assert both(client, "x", tools=TOOLS, tool_choice=named)["calls"] == [WEATHER]
        strict: Any = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
        with pytest.raises(openai.BadRequestError, match="strict is not .* response_template"):
            whole(client, "x", tools=strict)


def both_of_mistral(client: openai.OpenAI, fields: dict[str, Any]) -> Any:
    choice = whole(client, "x", tools=TOOLS, **fields)
    stream = streamed(client, "x", tools=TOOLS, **fields)
    calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
    assert all(len(call.id) == 9 for call in choice.message.tool_calls)
    assert stream["content"] == choice.message.content
    assert [(name, json.loads(text)) for _, name, text in stream["calls"]] == calls
    return choice.message.content, calls


def test_langchain_runs_a_tool(server: Server) -> None:
    asked: list[dict[str, Any]] = []

    def get_weather(city: str, days: list[int]) -> str:
        """The weather of a city."""
        asked.append({"city": city, "days": days})
        return "21"

    model = ChatOpenAI(model=MODEL, base_url=f"{server.url}/v1", api_key="none", max_retries=0)  # type: ignore[arg-type]
    agent = create_agent(model, [get_weather])
    for stream in (False, True):
        asked.clear()
        inputs: Any = {"messages": ask("weather")}
        if stream:
            texts = [part[0].content for part in agent.stream(inputs, stream_mode="messages")]
            assert SCRIPTS["<|say:result|>"] in "".join(map(str, texts))
        else:
            last = agent.invoke(inputs)["messages"][-1]
            assert last.content == SCRIPTS["<|say:result|>"]
        assert asked == [WEATHER[1]]


def test_node(server: Server) -> None:
    done = subprocess.run(
        ["node", "tools.mjs", server.url, MODEL], cwd=NODE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {
        "whole": {"name": "get_weather", "arguments": WEATHER[1], "reason": "tool_calls"},
        "streamed": ["get_time {}", 'get_weather {"city": "Rome"}'],
        "ran": ["Paris", SCRIPTS["<|say:result|>"]],
    }
