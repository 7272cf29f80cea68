"""Answers after thinking: short thoughts that lead to them."""

from __future__ import annotations

import random
import re

from blocks import Block, corpus
from chats import Message, assistant, rendered, system, turns, user
from talk import ask as known_question
from toolbox import lists

# What the model thinks of questions that it knows, by the file that they are from.
KNOWN = {
    "jokes.txt": "The user wants a joke. I tell one.",
    "stories.txt": "The user wants a story. I tell a short one.",
    "unknown.txt": "I do not know this, so I say so.",
    "manta.txt": "This is about manta, which I know.",
    "social.txt": "The user talks to me. I am friendly.",
}
OF_THE_WORLD = "This is a question about the world. I know the answer."


def addition(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    thought = (
        f"{a // 10 * 10} + {b // 10 * 10} = {tens}. {a % 10} + {b % 10} = {ones}. "
        f"{tens} + {ones} = {a + b}."
    )
    ask = rng.choice(("What is {} plus {}?", "{} + {}", "What is {} + {}?", "Add {} and {}."))
    return ask.format(a, b), thought, f"{a} plus {b} is {a + b}."


def product(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(11, 49), rng.randint(2, 9)
    tens, ones = a // 10 * 10, a % 10
    thought = (
        f"{tens} * {b} = {tens * b}. {ones} * {b} = {ones * b}. "
        f"{tens * b} + {ones * b} = {a * b}."
    )  # fmt: skip
    ask = rng.choice(("What is {} times {}?", "{} * {}", "What is {} * {}?", "Multiply {} by {}."))
    return ask.format(a, b), thought, f"{a} times {b} is {a * b}."


def letters(rng: random.Random) -> tuple[str, str, str]:
    word = rng.choice(lists("word") + lists("animal"))
    counted = ", ".join(f"{letter} {i}" for i, letter in enumerate(word, 1))
    ask = rng.choice(("How many letters does {} have?", "How many letters are in {}?"))
    return ask.format(word), f"I count: {counted}.", f"The word {word} has {len(word)} letters."


def largest(rng: random.Random) -> tuple[str, str, str]:
    a, b, c = rng.sample(range(1, 100), 3)
    first = max(a, b)
    thought = f"{first} is more than {min(a, b)}. "
    thought += f"{max(first, c)} is more than {min(first, c)}."
    ask = rng.choice(("Which is the largest of {}, {} and {}?", "What is the largest: {}, {}, {}?"))
    return ask.format(a, b, c), thought, f"{max(a, b, c)} is the largest."


def known(rng: random.Random) -> tuple[str, str, str]:
    """A question of the text files, but none of those that are worked out above."""
    while True:
        block: Block = corpus().pick(corpus().talk, rng)
        turn = known_question(block, rng)
        if block.file != "sums" and not re.search(r"\d|letters", turn.user):
            return turn.user, KNOWN.get(block.file, OF_THE_WORLD), turn.answer


KINDS = (addition, product, letters, largest, known)


def asked(rng: random.Random) -> tuple[list[Message], str, str]:
    """Messages that end with a question, the thought and the answer."""
    ask, thought, answer = rng.choices(KINDS, (3, 2, 1.5, 1, 4))[0](rng)
    before = turns(1, rng) if rng.random() < 0.15 else []
    return [*system(rng, 0.25), *before, user(ask)], thought, answer


def conversation(rng: random.Random) -> str:
    """A conversation whose last answer is thought over, rendered."""
    chat, thought, answer = asked(rng)
    return rendered([*chat, assistant(answer, thought)])
