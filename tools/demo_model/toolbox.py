"""Tools as a client offers them, and tasks for them: what a user asks, what the model must call.

Names, descriptions and parameters vary from document to document, some of them are invented, so
that the model takes a call's name and arguments from the signature before it, not from memory.
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from typing import Any

from blocks import corpus, split, words
from families import FAMILIES, Family, Parameter, arithmetic, deed_tool, property_tool
from talk import PLACE, invented, lowered, paraphrase

LANGUAGES = words("French Spanish German Italian Portuguese Dutch Polish Greek Turkish Japanese")
CURRENCIES = words("euros dollars yen pounds francs crowns pesos rupees")
ROOMS = words("kitchen bathroom bedroom garden hall cellar office garage attic study")
SIGNS = {"add": "+", "multiply": "*", "subtract": "-"}
STYLE_HELD_OUT = "srv_"  # a beginning of names that training never shows


@functools.cache
def capitals() -> dict[str, str]:
    """Country to capital, of the table in text/tables.txt."""
    block = next(b for b in corpus().blocks if "capital" in b.rows[0])
    return {row["name"]: row["capital"] for row in block.rows}


def value(kind: str, rng: random.Random) -> Any:
    """A value of a kind: a JSON number or a string. Many are invented, to be copied."""
    strange = rng.random() < 0.35
    if kind == "small":
        return rng.randint(1, 60)
    if kind == "number":
        return rng.randint(0, rng.choice((20, 100, 100, 1000, 10000)))
    if kind == "degrees":
        return rng.randint(-10, 39)
    if kind == "time":
        return f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    if kind == "city":
        return invented(rng) if strange else rng.choice([*capitals().values(), *lists("city")])
    if kind == "country":
        return invented(rng) if strange else rng.choice(list(capitals()))
    if kind == "topic":
        things = lists("animal" if strange else "word")
        return f"{rng.choice(lists('adj'))} {rng.choice(things)}"
    if kind == "key":
        return rng.choice((invented, number_key, some_name))(rng)
    if kind == "sentence":
        return rng.choice(lists("sentence")).rstrip(".")
    if kind in ("name", "strange", "word") and strange:
        return invented(rng).lower() if kind == "word" else invented(rng)
    own = {"language": LANGUAGES, "currency": CURRENCIES, "room": ROOMS, "state": ["on", "off"]}
    return rng.choice(own.get(kind) or lists(kind))


def lists(name: str) -> list[str]:
    return corpus().lists[name]


def number_key(rng: random.Random) -> str:
    return f"{rng.choice('ABCDEFGHKMNPRSTXZ')}{rng.randint(1, 999)}"


def some_name(rng: random.Random) -> str:
    return rng.choice(lists("name"))


def filled(text: str, values: dict[str, Any]) -> str:
    """The text with {x} replaced; JSON's own braces stay."""
    return PLACE.sub(lambda m: str(values[m[1]]) if m[1] in values else m[0], text)


# --- signatures ------------------------------------------------------------------------------


def styled(name: str, rng: random.Random, held_out: bool) -> str:
    """A name as programs write it: mostly get_weather, at times getWeather or home.get_weather."""
    if held_out:
        return STYLE_HELD_OUT + name
    roll = rng.random()
    if roll < 0.6:
        return name
    if roll < 0.75:
        first, *rest = name.split("_")
        return first + "".join(part.capitalize() for part in rest)
    if roll < 0.8:
        return name.replace("_", "-")
    if roll < 0.88:
        return rng.choice(("home.", "api_", "my_", "mcp__tools__", "tools-")) + name
    if roll < 0.92:
        return f"{name}_{rng.choice(('v2', 'tool', 'fn', '1'))}"
    return invented(rng).lower() if roll < 0.96 else f"{invented(rng).lower()}_{name}"


@dataclass(frozen=True)
class Tool:
    """A tool that is offered. keys: the family's values to the names of the parameters, with the
    JSON type of each."""

    family: Family
    signature: dict[str, Any]
    keys: dict[str, tuple[str, str]]

    @property
    def name(self) -> str:
        return str(self.signature["function"]["name"])


def schema(parameter: Parameter, kind: str, rng: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {"type": kind}
    if parameter.choices:
        made["enum"] = list(parameter.choices)
    if parameter.about and rng.random() < 0.4:
        made["description"] = rng.choice(split(parameter.about))
    if rng.random() < 0.04:
        made["title"] = parameter.key.capitalize()
    return made if rng.random() < 0.8 else dict(sorted(made.items()))


def offer(family: Family, rng: random.Random, held_out: bool = False) -> Tool:
    """A tool of the family, signed as one of many clients would."""
    plain = rng.choice(split(family.names))
    name = styled(plain, rng, held_out)
    properties, keys, required = {}, {}, []
    for parameter in family.parameters:
        if parameter.extra and rng.random() < 0.7:
            continue  # an optional parameter that this tool does not have
        called = rng.choice(split(parameter.names))
        if rng.random() < 0.04:
            called = invented(rng).lower()
        if called in properties:
            called = parameter.key
        kind = parameter.type
        if kind != "string" and rng.random() < 0.08:
            kind = "string"
        properties[called] = schema(parameter, kind, rng)
        keys[parameter.key] = (called, kind)
        if not parameter.extra:
            required.append(called)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required and rng.random() < 0.7:
        parameters["required"] = required
    if rng.random() < 0.15:
        parameters["additionalProperties"] = False
    if rng.random() < 0.04:
        parameters["$schema"] = "http://json-schema.org/draft-07/schema#"
    function: dict[str, Any] = {"name": name}
    told = plain in name or plain.replace("_", "-") in name
    if not told or rng.random() < 0.75:
        function["description"] = rng.choice(split(family.about))
    if properties or rng.random() < 0.7:
        function["parameters"] = parameters
    if rng.random() < 0.08:
        function["strict"] = True
    return Tool(family, {"type": "function", "function": function}, keys)


def draw_family(rng: random.Random, held_out: bool = False) -> Family:
    roll = rng.random()
    if roll < 0.2:
        return property_tool(rng, held_out)
    if roll < 0.3:
        return deed_tool(rng, held_out)
    if roll < 0.42:
        name = rng.choice(list(SIGNS))
        return arithmetic(rng, name, SIGNS[name])
    if roll < 0.55:
        return FAMILIES[0]  # the weather, which every example asks for
    return rng.choice(FAMILIES)


def offers(count: int, rng: random.Random, held_out: bool = False) -> list[Tool]:
    """Tools that differ in purpose and in name."""
    found: list[Tool] = []
    while len(found) < count:
        tool = offer(draw_family(rng, held_out), rng, held_out)
        # Two tools for the same could both be right; so could some that ask for the same thing.
        if all(t.family.need != tool.family.need and t.name != tool.name for t in found) and not (
            {t.family.need for t in found} | {tool.family.need}
        ) >= {"the time", "the time in {city}"}:
            found.append(tool)
    return found


# --- tasks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Something to be done with a tool: one call, what it returns, and the answer made of it."""

    tool: Tool
    values: dict[str, Any]
    arguments: dict[str, Any]
    ask: str
    result: str
    answer: str

    @property
    def call(self) -> dict[str, Any]:
        function = {"name": self.tool.name, "arguments": self.arguments}
        return {"type": "function", "function": function}

    @property
    def need(self) -> str:
        return filled(self.tool.family.need, self.values)


def drawn(family: Family, rng: random.Random, **fixed: Any) -> dict[str, Any]:
    """Values of the family, and what follows from them: the capital, the sum."""
    values = {key: value(kind, rng) for key, kind in family.values.items()} | fixed
    if "country" in values and values["country"] in capitals():
        values["capital"] = capitals()[values["country"]]
    if "from" in values:
        values["from"], values["to"] = rng.sample(CURRENCIES, 2)
    if "a" in values:
        values |= {
            "sum": values["a"] + values["b"],
            "product": values["a"] * values["b"],
            "difference": values["a"] - values["b"],
        }
    return values


def with_options(tool: Tool, ask: str, rng: random.Random) -> tuple[str, set[str], dict[str, Any]]:
    """The question with some of the tool's optional parameters, their keys, and values of those
    whose values are bounded."""
    given, values = set(), {}
    for parameter in tool.family.parameters:
        if parameter.extra and parameter.key in tool.keys and rng.random() < 0.5:
            given.add(parameter.key)
            if parameter.choices:
                values[parameter.key] = rng.choice(parameter.choices)
            mark = ask[-1] if ask[-1] in ".?" else ""
            ask = f"{ask.rstrip('.?')} {parameter.extra}{mark}"
    return ask, given, values


def task(tool: Tool, ask: str, values: dict[str, Any], rng: random.Random,
         options: frozenset[str] | set[str] = frozenset()) -> Task:  # fmt: skip
    """The task that the question ``ask``, whose places are not filled yet, is."""
    arguments = {}
    for parameter in tool.family.parameters:
        if not parameter.extra or parameter.key in options:
            name, kind = tool.keys[parameter.key]
            given = values[parameter.key]
            arguments[name] = str(given) if kind == "string" else given
    result, _, answer = rng.choice(tool.family.outcomes).partition(" => ")
    return Task(tool, values, arguments, filled(ask, values), filled(result, values),
                filled(answer, values))  # fmt: skip


def single(tool: Tool, rng: random.Random, held_out: bool = False, again: bool = False) -> Task:
    """A question for one call, or one that goes on from a question before it."""
    family = tool.family
    if again and family.again:
        return task(tool, rng.choice(split(family.again)), drawn(family, rng), rng)
    ask = rng.choice(split(family.held_out if held_out else family.asks))
    ask, options, chosen = with_options(tool, ask, rng)
    if not held_out and rng.random() < 0.4:
        ask = paraphrase(ask, rng)
    if rng.random() < 0.1:
        ask = ask.lower()  # values keep their capitals: they are to be copied
    return task(tool, ask, drawn(family, rng) | chosen, rng, options)


def double(tools: list[Tool], rng: random.Random, held_out: bool = False) -> tuple[str, list[Task]]:
    """A question that takes two calls: of one tool, or of two."""
    tool = tools[0]
    family = tool.family
    if len(tools) == 1 or (family.both and rng.random() < 0.5):
        if not family.both:
            # Nobody asks twice for what takes no argument.
            pair = [single(tool, rng, held_out) for _ in range(2 if family.parameters else 1)]
            return joined(pair, rng)
        values = drawn(family, rng)
        key = next(iter(family.values))
        while str(values["other"]) == str(values[key]):
            values["other"] = value(family.values["other"], rng)
        ask = rng.choice(split(family.both))
        both = [values, drawn(family, rng, **{key: values["other"]})]
        return filled(ask, values), [task(tool, ask, each, rng) for each in both]
    return joined([single(each, rng, held_out) for each in tools[:2]], rng)


def joined(pair: list[Task], rng: random.Random) -> tuple[str, list[Task]]:
    """One or two tasks that are asked for in one message."""
    if len(pair) == 1:
        return pair[0].ask, pair
    first, second = (task.ask if task.ask[-1] in ".?!" else task.ask + "." for task in pair)
    link = rng.choice(("", "And ", "Also, "))
    return f"{first} {link}{lowered(second) if link else second}", pair


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
