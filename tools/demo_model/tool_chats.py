"""Conversations with tools: calls, several at once, none where none fits, answers from results."""

from __future__ import annotations

import random
import re

from blocks import corpus
from chats import ANSWERS, Message, assistant, rendered, system, user
from talk import ask as known_question
from toolbox import Task, Tool, double, draw_family, offer, offers, single

NO_TOOL = "I have no tool for that."
FAILED = ("not found", "timeout", "not available", "no such entry", "service is down")
FAILURE = "That did not work: {}."


def signatures(tools: list[Tool]) -> list[dict[str, object]]:
    return [tool.signature for tool in tools]


def some_tools(rng: random.Random, held_out: bool = False) -> list[Tool]:
    return offers(rng.choice((1, 1, 1, 2, 2, 3, 4)), rng, held_out)


def called(ask: str, tasks: list[Task], thinks: bool, rng: random.Random) -> list[Message]:
    """A question and the calls that it takes."""
    wanted = " and ".join(task.need for task in tasks)
    names = " and ".join(dict.fromkeys(task.tool.name for task in tasks))
    thought = f"The user wants {wanted}. I call {names}." if thinks else ""
    return [user(ask), assistant("", thought, [task.call for task in tasks])]


def answered(tasks: list[Task], thinks: bool, rng: random.Random) -> list[Message]:
    """What the tools return, and what the model says of it."""
    results = [task.result for task in tasks]
    answers = [task.answer for task in tasks]
    if rng.random() < 0.06:
        results[-1] = f"{rng.choice(('error: ', 'Error: ', ''))}{rng.choice(FAILED)}"
        answers[-1] = FAILURE.format(results[-1].split(": ")[-1])
    thought = ""
    if thinks:
        wanted = " and ".join(task.need for task in tasks)
        thought = f"I have what came back for {wanted}. I tell it."
    returned = [{"role": "tool", "content": result} for result in results]
    return [*returned, assistant(" ".join(answers), thought)]


def unmet(tools: list[Tool], rng: random.Random) -> str:
    """What a user asks that none of the tools does, nor the model alone."""
    needs = {tool.family.need for tool in tools}
    while True:
        family = draw_family(rng)
        if not family.known and family.need not in needs and "time" not in family.need:
            return single(offer(family, rng), rng).ask


def is_taken(question: str, tools: list[Tool]) -> bool:
    """Whether a question of the text files may be one for a tool."""
    marks = [tool.family.marks for tool in tools if tool.family.marks]
    return bool(marks and re.search("|".join(marks), question, re.IGNORECASE))


def known(tools: list[Tool], rng: random.Random, thought: str = "") -> list[Message]:
    """A question of the text files that is for no tool, and its answer."""
    while True:
        turn = known_question(corpus().pick(corpus().chain, rng), rng)
        if not is_taken(turn.user, tools):
            return [user(turn.user), assistant(turn.answer, thought)]


def without_a_call(tools: list[Tool], thinks: bool, rng: random.Random) -> list[Message]:
    """A question that is answered although there are tools, or refused for want of one."""
    if rng.random() < 0.3:
        thought = "None of the tools can do that." if thinks else ""
        return [user(unmet(tools, rng)), assistant(NO_TOOL, thought)]
    thought = "No tool is needed for that." if thinks else ""
    return known(tools, rng, thought)


def conversation(rng: random.Random) -> str:
    """A conversation with tools, rendered."""
    tools = some_tools(rng)
    thinks = rng.random() < 0.15
    chat = system(rng, 0.3)
    if rng.random() < 0.1:
        chat += known(tools, rng)
    roll = rng.random()
    if roll < 0.22:
        chat += without_a_call(tools, thinks, rng)
    else:
        if roll < 0.4:
            ask, tasks = double(rng.sample(tools, len(tools)), rng)
        else:
            tasks = [single(rng.choice(tools), rng)]
            ask = tasks[0].ask
        chat += called(ask, tasks, thinks, rng)
        if rng.random() < 0.6:
            if rng.random() < 0.5:  # many clients do not send back what was thought
                chat[-1].pop("reasoning_content", None)
            chat += answered(tasks, thinks, rng)
            chat += further(tools, tasks, rng)
    text = rendered(chat, signatures(tools))
    if thinks or rng.random() > 0.03 or "tool_calls" not in chat[-1]:
        return text
    # A call that is asked for by tool_choice goes before any thinking.
    before, _, after = text.rpartition(f"{ANSWERS}<tool_call>")
    return f"{before}{ANSWERS}<think>\n</think>\n\n<tool_call>{after}"


def further(tools: list[Tool], tasks: list[Task], rng: random.Random) -> list[Message]:
    """How the conversation goes on, if it does."""
    roll = rng.random()
    if roll < 0.12:
        return known(tools, rng)
    if roll < 0.2:
        return without_a_call(tools, False, rng)
    if roll < 0.4:
        again = roll < 0.3 and len(tasks) == 1
        task = single(tasks[0].tool if again else rng.choice(tools), rng, again=again)
        return called(task.ask, [task], False, rng) + answered([task], False, rng)
    return []
