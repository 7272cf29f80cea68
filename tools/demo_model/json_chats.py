"""Answers in JSON, where the user or the system message says so."""

from __future__ import annotations

import random
from typing import Any

from blocks import corpus, split
from chats import Message, assistant, rendered, system, turns, user
from talk import ARTICLE, invented
from talk import ask as known_question
from toolbox import as_json, capitals, lists, value

# What can be said of a person: the fields' names, the words of the person and those of others.
PERSON = {
    "name": ("name | name | name | person | who", "My name is {} | I am {} | I'm {}", "{}"),
    "age": ("age | age | years", "I am {} years old | I'm {}", "is {} years old"),
    "city": ("city | city | town | home", "I live in {} | my home is {}", "lives in {}"),
    "job": ("job | job | work | profession", "I work as a {} | my job is {}", "works as a {}"),
    "color": ("color | colour | favourite_color", "my favourite colour is {} | I like {}",
              "likes the colour {}"),
    "food": ("food | food | favourite_food", "I love {} | I like to eat {}", "likes to eat {}"),
}  # fmt: skip
FORMS = (
    "Answer in JSON with the fields {}.", "Answer in JSON with the keys {}.",
    "Reply in JSON with the fields {}.", "Give me JSON with the fields {}.",
    "Answer as a JSON object with {}.", "Return JSON with the keys {}.",
    "Write it as JSON with the fields {}.", "Respond in JSON with {}.",
)  # fmt: skip
FORMS_HELD_OUT = ("I want JSON with the fields {}.", "Make it a JSON object with the keys {}.")
FREE = ("Answer in JSON.", "Reply in JSON.", "Answer as JSON.", "JSON, please.", "Respond in JSON.")
PLURALS = {"animal": "animals", "color": "colours", "city": "cities", "food": "foods",
           "month": "months", "name": "names", "word": "words", "job": "jobs"}  # fmt: skip
COUNTS = {2: "two", 3: "three", 4: "four"}


def listed(fields: list[str], rng: random.Random) -> str:
    """Fields as people list them: name, age and city; or quoted."""
    shown = [f'"{f}"' for f in fields] if rng.random() < 0.2 else fields
    if len(shown) == 1:
        return shown[0]
    return ", ".join(shown[:-1]) + rng.choice((" and ", " and ", ", ")) + shown[-1]


def form(fields: list[str], rng: random.Random, held_out: bool) -> str:
    text = rng.choice(FORMS_HELD_OUT if held_out else FORMS).format(listed(fields, rng))
    return text.replace("fields", "field").replace("keys", "key") if len(fields) == 1 else text


def person(rng: random.Random, held_out: bool) -> tuple[str, str, Any]:
    """Something about a person, which the JSON repeats: the text, the order, the answer."""
    known = ["name", *rng.sample([k for k in PERSON if k != "name"], rng.randint(1, 3))]
    values = {k: int(value("age", rng)) if k == "age" else value(k, rng) for k in known}
    if rng.random() < 0.5:
        parts = [rng.choice(split(PERSON[k][1])).format(values[k]) for k in known]
        text = parts[0] + "".join(f" and {p}" for p in parts[1:]) + "."
    else:
        parts = [PERSON[k][2].format(values[k]) for k in known]
        text = f"{parts[0]} {' and '.join(parts[1:])}."
    asked = rng.sample(known, rng.randint(1, len(known)))
    if rng.random() < 0.7:
        asked = [k for k in known if k in asked]
    if rng.random() < 0.08:
        asked.append(rng.choice([k for k in PERSON if k not in known]))
    text = ARTICLE.sub(r"\1n ", text)
    names = {k: rng.choice(split(PERSON[k][0])) for k in asked}
    answer = {names[k]: values.get(k) for k in asked}
    return text[0].upper() + text[1:], form(list(answer), rng, held_out), answer


def fact(rng: random.Random, held_out: bool) -> tuple[str, str, Any]:
    """A question whose answer is a value: a capital, a sum, yes or no."""
    roll = rng.random()
    if roll < 0.35:
        country, capital = rng.choice(list(capitals().items()))
        key, text, got = "capital", f"What is the capital of {country}?", capital
    elif roll < 0.6:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        sign, got = rng.choice((("plus", a + b), ("+", a + b)))
        key, text = rng.choice(("result", "sum", "answer")), f"What is {a} {sign} {b}?"
    elif roll < 0.8:
        number = rng.randint(0, 50)
        key, text, got = "even", f"Is {number} even?", number % 2 == 0
    else:
        kind, plural = rng.choice(list(PLURALS.items()))
        count = rng.choice(list(COUNTS))
        got = rng.sample(lists(kind), count)
        given = ", ".join(got)
        key, text = plural, f"Here are {COUNTS[count]} {plural}: {given}."
    if rng.random() < 0.15:
        key = invented(rng).lower()
    return text, form([key], rng, held_out), {key: got}


def free(rng: random.Random, held_out: bool) -> tuple[str, str, Any]:
    """Any question of the text files, whose answer becomes a field."""
    while True:
        turn = known_question(corpus().pick(corpus().talk, rng), rng)
        if len(turn.answer) < 160:
            break
    key = rng.choice(("answer", "reply", "text", invented(rng).lower()))
    if rng.random() < 0.5 and not held_out:
        return turn.user, rng.choice(FREE), {"answer": turn.answer}
    return turn.user, form([key], rng, held_out), {key: turn.answer}


def asked(rng: random.Random, held_out: bool = False) -> tuple[list[Message], Any]:
    """Messages that ask for JSON, and the value that the answer is."""
    kind = rng.choices((person, fact, free), (5, 3, 2))[0]
    text, order, answer = kind(rng, held_out)
    if rng.random() < 0.3:
        return [{"role": "system", "content": order}, user(text)], answer
    both = (text, order) if rng.random() < 0.75 else (order, text)
    return [*system(rng, 0.2), user(" ".join(both))], answer


def conversation(rng: random.Random) -> str:
    """A conversation that ends with an answer in JSON, at times goes on without; rendered."""
    chat, answer = asked(rng)
    if chat[0]["role"] == "user" and rng.random() < 0.15:
        chat = turns(1, rng) + chat
    thought = ""
    if rng.random() < 0.15:
        thought = f"The user wants JSON with {' and '.join(answer)}."
    chat.append(assistant(as_json(answer), thought))
    if chat[0]["role"] == "user" and rng.random() < 0.1:
        chat += turns(1, rng)
    return rendered(chat)
