"""The evaluation questions about tools, JSON and thinking, and the judge of answers to them.

A question has `kind`, `held_out` (words and names that training never shows), `messages`, and
where they apply `tools`, `tool_choice` and `thinks`. Right answers have exactly `calls`, or are
`json`, or hold one of `expect`; and they think if and only if `thinks`.
"""

from __future__ import annotations

import json
import random
from typing import Any

import json_chats
import thoughts
from blocks import corpus
from chats import CHAT_TEMPLATE, assistant, rendered, user
from talk import expected, fill
from tool_chats import NO_TOOL, is_taken, signatures, some_tools, unmet
from toolbox import Task, Tool, double, single

from engine.parsing.answers import AnswerFormat
from engine.parsing.formats import AUTO, answer_format
from engine.parsing.parser import Parser
from engine.parsing.parts import Folded

Question = dict[str, Any]

# The example of docs/api.md, which every reader tries.
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def calls_of(tasks: list[Task]) -> list[dict[str, Any]]:
    return [{"name": task.tool.name, "arguments": task.arguments} for task in tasks]


def about_calls(kind: str, rng: random.Random, held_out: bool) -> Question:
    """A question that takes calls: kind call, parallel, required, named or thinking call."""
    tools = some_tools(rng, held_out)
    if kind == "parallel":
        ask, tasks = double(rng.sample(tools, len(tools)), rng, held_out)
    else:
        tasks = [single(rng.choice(tools), rng, held_out)]
        ask = tasks[0].ask
    question = {"messages": [user(ask)], "tools": signatures(tools), "calls": calls_of(tasks)}
    if kind == "required":
        question["tool_choice"] = "required"
    if kind == "named":
        question["tool_choice"] = tasks[0].tool.name
    if kind == "thinking call":
        question["thinks"] = True
    return question


def about_results(rng: random.Random, held_out: bool) -> Question:
    """A question whose call was made: the answer must tell its result."""
    tools = some_tools(rng, held_out)
    task = single(rng.choice(tools), rng, held_out)
    messages = [
        user(task.ask),
        assistant("", calls=[task.call]),
        {"role": "tool", "content": task.result},
    ]
    return {"messages": messages, "tools": signatures(tools), "expect": [task.answer]}


def without_calls(rng: random.Random) -> Question:
    """A question that no tool is for: one of the text files, or one that only a tool answers."""
    tools: list[Tool] = some_tools(rng)
    if rng.random() < 0.3:
        ask, expect = unmet(tools, rng), [NO_TOOL]
    else:
        blocks = [b for b in corpus().chain if b.get("X") and b.choices("Q")]
        ask = ""
        while not ask or is_taken(ask, tools):
            block = rng.choice(blocks)
            bound = dict(rng.choice(block.rows), template="word:")
            ask = fill(rng.choice(block.choices("Q")), bound, rng)
        expect = expected(block, bound, rng)
    return {"messages": [user(ask)], "tools": signatures(tools), "expect": expect}


def about_json(rng: random.Random, held_out: bool) -> Question:
    messages, value = json_chats.asked(rng, held_out)
    return {"messages": messages, "json": value}


def about_thinking(rng: random.Random) -> Question:
    while True:
        messages, _, answer = thoughts.asked(rng)
        if any(c.isdigit() for c in answer):  # other answers may be worded in many ways
            return {"messages": messages, "thinks": True, "expect": [answer]}


def examples() -> list[Question]:
    """Those that documentation and demos show."""
    ask = user("What is the weather in Paris?")
    call = {"name": "get_weather", "arguments": {"city": "Paris"}}
    made = assistant("", calls=[{"type": "function", "function": call}])
    returned = {"role": "tool", "content": "21 degrees"}
    person = user("My name is Anna and I am 30 years old. "
                  "Answer in JSON with the fields name and age.")  # fmt: skip
    return [
        {"kind": "call", "messages": [ask], "tools": [WEATHER], "calls": [call]},
        {"kind": "thinking call", "messages": [ask], "tools": [WEATHER], "thinks": True,
         "calls": [call]},
        {"kind": "result", "messages": [ask, made, returned], "tools": [WEATHER],
         "expect": ["It is 21 degrees in Paris."]},
        {"kind": "no call", "messages": [user("What is manta?")], "tools": [WEATHER],
         "expect": ["serving system"]},
        {"kind": "json", "messages": [person], "json": {"name": "Anna", "age": 30}},
        {"kind": "thinking", "messages": [user("What is 27 plus 58?")], "thinks": True,
         "expect": ["27 plus 58 is 85."]},
    ]  # fmt: skip


def agent_questions(seed: int) -> list[Question]:
    """The evaluation set, some 300 questions."""
    rng = random.Random(f"agent questions {seed}")
    found = [{"held_out": False, **question} for question in examples()]
    for held_out in (False, True):
        for kind in ("call", "call", "parallel", "required", "named", "thinking call"):
            for _ in range(20 if kind == "call" else 15):
                found.append({"kind": kind, "held_out": held_out,
                              **about_calls(kind, rng, held_out)})  # fmt: skip
        for _ in range(25):
            found.append({"kind": "result", "held_out": held_out, **about_results(rng, held_out)})
        for _ in range(30):
            found.append({"kind": "json", "held_out": held_out, **about_json(rng, held_out)})
    for _ in range(30):
        found.append({"kind": "no call", "held_out": False, **without_calls(rng)})
        found.append({"kind": "thinking", "held_out": False, **about_thinking(rng)})
    return found


# --- the judge -------------------------------------------------------------------------------


def format_of(question: Question) -> AnswerFormat:
    """How manta reads the answers: what it finds by the chat template."""
    form = answer_format(AUTO, AUTO, CHAT_TEMPLATE, "tools" in question)
    assert form is not None
    return form


def prompt_of(question: Question) -> tuple[str, str]:
    """The prompt, and how the answer begins that it ends with; as manta's server makes both."""
    prompt = rendered(question["messages"], question.get("tools"), add_generation_prompt=True,
                      enable_thinking=question.get("thinks", False))  # fmt: skip
    choice = question.get("tool_choice")
    if choice is None:
        return prompt, ""
    form = format_of(question)
    name = None if choice == "required" else choice
    prefix = form.prefix(name, form.opened_by(prompt)) or ""
    return prompt + prefix.rstrip(" "), prefix.rstrip(" ")


def read(question: Question, text: str) -> Folded:
    """The parts of an answer, ``text`` being what follows the prompt."""
    form = format_of(question)
    _, prefix = prompt_of(question)
    opened = bool(question.get("thinks"))
    parser = Parser(form, question.get("tools", ()), opened)
    parts = parser.push(prefix + text) + parser.finish(cut=False)
    return Folded().add(parts)


def is_right(question: Question, text: str) -> bool:
    """Whether an answer is right, ``text`` being what follows the prompt."""
    parts = read(question, text)
    calls = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in parts.calls]
    if bool(parts.reasoning) != question.get("thinks", False):
        return False
    if calls != question.get("calls", []) or (calls and parts.content):
        return False
    if "json" in question:
        try:
            return bool(json.loads(parts.content) == question["json"])
        except ValueError:
            return False
    expect = question.get("expect")
    return not expect or any(x.lower() in parts.content.lower() for x in expect)
