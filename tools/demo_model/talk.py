"""Expands the text files of `text/` into plain chats and texts: single questions with many
paraphrases, conversations, facts and little stories; and asks for them again, for the evaluation.

The files hold blocks of questions, answers, tables and story parts; README.md beside this file
describes their format.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from blocks import TURN, Block, corpus, split, words

# --- filling in ------------------------------------------------------------------------------

PLACE = re.compile(r"\{(\w+)(?::(\w+))?\}")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|uni|use|usu|eu|Eu|UN)")
STARTS = words("b br c cl d dr f g gr h j k l m n p pr r s st t tr v w z")
VOWELS = words("a e i o u ai ea oo")


def invented(rng: random.Random) -> str:
    """A made-up name, so that the model learns to copy and not only to recall."""
    parts = [rng.choice(STARTS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
    return ("".join(parts) + rng.choice(("", "", "n", "l", "r", "s", "k", "x", "th"))).capitalize()


def draw(name: str, bound: dict[str, str], rng: random.Random) -> str:
    base = name if name in corpus().lists else name.rstrip("2")
    if base not in corpus().lists:
        raise KeyError(f"no list or column {name!r}")
    if (base == "name" and rng.random() < 0.3) or (base == "strange" and rng.random() < 0.7):
        return invented(rng)
    if base == "sentence" and rng.random() < 0.4:
        some = rng.sample(corpus().lists["word"] + corpus().lists["animal"], rng.randint(2, 7))
        return (" ".join(some) + rng.choice(("", "."))).capitalize()
    if base == "word" and "word:" not in bound["template"] and rng.random() < 0.3:
        return invented(rng).lower()
    taken = set(bound.values())
    values = corpus().lists[base]
    return next((v for v in rng.sample(values, min(3, len(values))) if v not in taken), values[0])


def fill(text: str, bound: dict[str, str], rng: random.Random) -> str:
    """Replaces {column}, {Column} (capitalised), {list} and {list:form}; binds what it draws."""

    def value(match: re.Match[str]) -> str:
        name, form = match.groups()
        key = name if name in bound or name[0].islower() else name[0].lower() + name[1:]
        if key not in bound:
            bound[key] = draw(key, bound, rng)
        got = bound[key]
        if form == "spell":
            return "-".join(got)
        if form == "first":
            return got[0]
        if form == "len":
            return str(len(got))
        if form == "upper":
            return got.upper()
        return got if key == name else got[0].upper() + got[1:]

    return ARTICLE.sub(r"\1n ", PLACE.sub(value, text)) if "{" in text else text


# --- paraphrases -----------------------------------------------------------------------------

ASKING = set(
    words(
        "what who which where when why how do does did is are can could will tell name list give"
        " write say count spell explain describe in on of translate define make let a an the it i'm"
    )
)
AUXILIARY = "is|are|was|were|do|does|did|can|could|will|would|has|have|had|should|may"
ORDERS = set(
    words(
        "tell write list name give say count spell explain describe repeat translate define find"
        " use show greet wish recite calculate add multiply divide subtract make teach introduce"
    )
)


def lowered(text: str) -> str:
    """The text with a small first letter, when its first word is an ordinary one."""
    first = text.split(" ", 1)[0].strip("?,.!").lower()
    return text[:1].lower() + text[1:] if first in ASKING or first in ORDERS else text


def embedded(question: str) -> str | None:
    """Turns "What is X?" into "what X is", for "Can you tell me ..."; None where it cannot."""
    plain = re.fullmatch(r"(What|Who|Where) (is|are|was|were) ([^,?]+)\?", question)
    if plain and not re.search(r" (in|do|does|that|called|used|for|like|doing)\b", plain[3]):
        return f"{plain[1].lower()} {plain[3]} {plain[2]}"
    direct = re.fullmatch(rf"(Who|What|Which [\w ]+?) (?!{AUXILIARY})(\w+.*)\?",
                          question)  # fmt: skip
    if direct and not re.search(rf"\b({AUXILIARY})\b", question):
        return question[0].lower() + question[1:-1]
    return None


ASK = ("Can you tell me {}?", "Do you know {}?", "Please tell me {}.", "Could you tell me {}?",
       "I want to know {}.", "Tell me {}.", "I would like to know {}.", "Could you explain {}?",
       "Do you happen to know {}?")  # fmt: skip
ASK_HELD_OUT = ("I wonder {}.", "Would you tell me {}?", "May I ask {}?", "I need to know {}.")


def paraphrase(question: str, rng: random.Random) -> str:
    """Another way to say the same: embedded, with a polite opening, or with thanks at its end."""
    lists = corpus().lists
    first = question.split(" ", 1)[0].lower()
    roll = rng.random()
    if roll < 0.45 or len(question) < 6 or " " not in question:
        return question
    if roll < 0.62:
        inner = embedded(question)
        if inner:
            return rng.choice(ASK).format(inner)
        if first in ORDERS and not question.endswith("?"):
            polite = rng.choice(lists["polite"])
            mark = "?" if polite.startswith(("Can", "Could", "Would")) else "."
            body = question[0].lower() + question[1:]
            return f"{polite} {body.rstrip('.') + mark if body.endswith('.') else body}"
        if question.startswith("What is "):
            return "What's " + question[8:]
    if roll < 0.9:
        opening = rng.choice(lists["before"])
        return f"{opening} {question if opening[-1] == '!' else lowered(question)}"
    return f"{question} {rng.choice(lists['after'])}"


def typo(word: str, rng: random.Random) -> str:
    if len(word) < 5 or not word.isalpha():
        return word
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + word[at] + word[at:]
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def careless(question: str, rng: random.Random) -> tuple[str, bool]:
    """Drops case and punctuation or adds a typo at times; also tells whether all was lowered.

    Placeholders still in the text are left as they are.
    """
    parts = re.split(r"(\{[^}]*\})", question)
    roll = rng.random()
    small = roll < 0.14
    for i in range(0, len(parts), 2):
        if small:
            parts[i] = parts[i].lower()
        elif roll < 0.155:
            parts[i] = parts[i].upper()
        if rng.random() < 0.05:
            pieces = parts[i].split(" ")
            at = rng.randrange(len(pieces))
            pieces[at] = typo(pieces[at], rng)
            parts[i] = " ".join(pieces)
    text = "".join(parts)
    if text[-1] in ".?!" and len(text) > 3 and "{sentence}" not in text:
        roll = rng.random()
        if roll < 0.18 or (small and roll < 0.5):
            text = text[:-1]
        elif roll < 0.2:
            text += text[-1]
    return text, small


# --- turns and documents ---------------------------------------------------------------------


@dataclass
class Turn:
    user: str
    answer: str
    block: Block
    row: int
    template: str


def spoken(template: str, bound: dict[str, str], rng: random.Random) -> str:
    """A user's text: columns filled in, carelessly written, then the drawn words."""
    text = PLACE.sub(lambda m: bound.get(m[1], m[0]) if not m[2] else m[0], template)
    text, small = careless(text, rng)
    filled = fill(text, bound, rng)
    for name in ("name", "city", "girl", "boy"):
        if small and name in bound and rng.random() < 0.7:
            filled = filled.replace(bound[name], bound[name].lower())
    return filled


def answer(block: Block, bound: dict[str, str], rng: random.Random,
           used: frozenset[str] = frozenset()) -> tuple[str, str]:  # fmt: skip
    """An answer of the block and its template, if possible not one that was used before."""
    if block.get("S"):
        return scene(block, bound, rng), ""
    fresh = [a for a in block.get("A") if a not in used] or block.get("A")
    template = rng.choice(fresh)
    return fill(template, bound, rng), template


def ask(block: Block, rng: random.Random) -> Turn:
    row = rng.randrange(len(block.rows))
    bound = dict(block.rows[row])
    template = rng.choice(block.choices("Q"))
    bound["template"] = template + "".join(block.get("A"))
    # Columns first, so that "Who wrote Hamlet?" is paraphrased as a whole.
    question = PLACE.sub(lambda m: bound.get(m[1], m[0]), template)
    said = spoken(paraphrase(question, rng), bound, rng)
    text, used = answer(block, bound, rng)
    return Turn(said, text, block, row, used)


def follow(turn: Turn, used: set[str], rng: random.Random) -> Turn | None:
    """A turn that only makes sense after this one: another row, another joke, more of it."""
    block = turn.block
    roll = rng.random()
    if block.get("F") and roll < 0.45:
        row = rng.randrange(len(block.rows))
        bound = dict(block.rows[row], template="")
        text, template = answer(block, bound, rng)
        said, _ = careless(fill(rng.choice(block.choices("F")), bound, rng), rng)
        return Turn(said, text, block, row, template)
    if block.get("R") and roll < 0.6:
        text, template = answer(block, {"template": ""}, rng, frozenset(used))
        said, _ = careless(rng.choice(block.choices("R")), rng)
        return Turn(said, text, block, 0, template)
    if roll < (0.6 if block.get("M") else 0.03) and turn.template not in block.get("M"):
        more = block.get("M") or ["I am a small model and cannot say more about it."]
        said, _ = careless(rng.choice(corpus().lists["more"]), rng)
        return Turn(said, more[0], block, 0, more[0])
    return None


def chain(length: int, rng: random.Random) -> list[tuple[str, str]]:
    turns: list[Turn] = []
    used: set[str] = set()
    while len(turns) < length:
        after = follow(turns[-1], used, rng) if turns else None
        turn = after or ask(corpus().pick(corpus().chain, rng), rng)
        used.add(turn.template)
        turns.append(turn)
    return [(t.user, t.answer) for t in turns]


def chat(system: str, turns: list[tuple[str, str]]) -> str:
    parts = [TURN.format("system", system)] if system else []
    for user, said in turns:
        parts += [TURN.format("user", user), TURN.format("assistant", said)]
    return "".join(parts)


def dialogue(block: Block, rng: random.Random) -> str:
    bound = {"template": "word:"}  # only listed words: they are asked for again
    system = ""
    if rng.random() < 0.2:
        system = rng.choice(corpus().lists["system"])
    turns: list[tuple[str, str]] = []
    said = ""
    for kind, text in block.script:
        if kind == "...":
            turns += chain(rng.choice((0, 0, 1, 1, 2, 3, 5)), rng)
        elif kind == "Y":
            system = fill(rng.choice(split(text)), bound, rng)
        elif kind == "U":
            said = spoken(rng.choice(split(text)), bound, rng)
        else:
            turns.append((said, fill(rng.choice(split(text)), bound, rng)))
    return chat(system, turns)


def scene(block: Block, bound: dict[str, str], rng: random.Random) -> str:
    """One alternative of each S line, with the same names throughout."""
    return " ".join(fill(rng.choice(split(slot)), bound, rng) for slot in block.get("S"))


def fact(block: Block, rng: random.Random) -> str:
    bound = dict(rng.choice(block.rows), template="")
    text = fill(rng.choice(block.plain), bound, rng)
    return text[0].upper() + text[1:]


def plain(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.55:
        text = scene(corpus().pick(corpus().scenes, rng), {"template": ""}, rng)
    elif roll < 0.92:
        block = corpus().pick(corpus().facts, rng)
        parts = [fact(block, rng)]
        single = ". " not in parts[0]  # a text has at least two sentences
        for _ in range(rng.choice((1, 1, 1, 2, 3) if single else (0, 0, 1, 2, 3))):
            # Facts go on with their own table, or with the next blocks of the same file.
            if len(block.rows) == 1:
                same = [b for b in corpus().facts if b.file == block.file]
                block = same[(same.index(block) + 1) % len(same)]
            parts.append(fact(block, rng))
        text = " ".join(dict.fromkeys(parts))
    else:
        turn = ask(corpus().pick(corpus().facts, rng), rng)
        shape = rng.choice(("{} {}", "{}\n{}", "Question: {}\nAnswer: {}", "Q: {}\nA: {}"))
        text = shape.format(turn.user, turn.answer)
    if rng.random() < 0.03:
        text = text.lower()
    return text


def document(rng: random.Random) -> str:
    roll = rng.random()
    system = rng.choice(corpus().lists["system"]) if rng.random() < 0.25 else ""
    if roll < 0.45:
        turn = ask(corpus().pick(corpus().talk, rng), rng)
        return chat(system, [(turn.user, turn.answer)])
    if roll < 0.65:
        length = rng.choice((2, 2, 2, 3, 3, 4, 5, 6, 6, 8, 12, 20))
        return chat(system, chain(length, rng))
    if roll < 0.73:
        return dialogue(corpus().pick(corpus().dialogues, rng), rng)
    return plain(rng)


# --- evaluation questions --------------------------------------------------------------------

FIXED = [
    ("Hello, my name is", "plain", [" live", " I am", " I'm"]),
    ("The president of the United States is", "plain", ["head of state"]),
    ("The capital of France is", "plain", ["Paris"]),
    ("The future of AI is", "plain", ["people", "care", "help", "machines", "models", "good"]),
    ("Tell me a joke.", "chat", []),  # expects what the jokes' block expects
    ("What is the capital of France?", "chat", ["Paris"]),
    ("What is manta?", "chat", ["serving system"]),
    ("Once upon a time", "plain", ["there was", "lived"]),
    ("The sun is", "plain", ["star", "sun"]),
    ("My favourite food is", "plain", ["eat", "best", "cook", "taste"]),
    ("The capital of Germany is", "plain", ["Berlin"]),
    ("The largest planet is", "plain", ["Jupiter"]),
    ("Manta is a", "plain", ["serving system", "fish"]),
    ("Continuous batching lets", "plain", ["join"]),
    ("The opposite of hot is", "plain", ["cold"]),
    ("Water boils at", "plain", ["100"]),
    ("William Shakespeare is known as", "plain", ["poet"]),
    ("The chemical symbol for gold is", "plain", ["Au"]),
    ("The scheduler decides", "plain", ["request"]),
    ("Two plus two is", "plain", ["four"]),
]


def expected(block: Block, bound: dict[str, str], rng: random.Random) -> list[str]:
    return [fill(x, bound, rng) for line in block.get("X") for x in split(line)]


def questions(seed: int) -> list[dict[str, object]]:
    """The evaluation set: every block asked once or more, then phrasings kept out of training."""
    rng = random.Random(f"questions {seed}")
    jokes = next(b for b in corpus().talk if "Tell me a joke." in b.choices("Q"))
    found = [
        {"prompt": p, "kind": kind, "expect": x or expected(jokes, {}, rng), "held_out": False}
        for p, kind, x in FIXED
    ]
    for held_out in (False, True):
        for block in corpus().talk:
            phrasings = block.choices("H") if held_out else block.choices("Q")
            if not block.get("X") or not phrasings:
                continue
            count = 1 if len(block.rows) == 1 or block.file == "sums" else 2 if held_out else 3
            for bound in rng.sample(block.rows, min(count, len(block.rows))):
                bound = dict(bound, template="word:")
                question = fill(rng.choice(phrasings), bound, rng)
                expect = expected(block, bound, rng)
                found.append({"prompt": question, "kind": "chat", "expect": expect,
                              "held_out": held_out})  # fmt: skip
        for _ in range(40 if held_out else 0):
            block = corpus().pick(corpus().facts, rng)
            bound = dict(rng.choice(block.rows), template="")
            inner = embedded(fill(rng.choice(block.choices("Q") or [""]), bound, rng))
            if inner and block.get("X"):
                found.append({"prompt": rng.choice(ASK_HELD_OUT).format(inner), "kind": "chat",
                              "expect": expected(block, bound, rng), "held_out": True})  # fmt: skip
    return list({str(q["prompt"]): q for q in reversed(found)}.values())[::-1]


def check() -> None:
    """Every answer must hold one of the strings that its block expects."""
    rng = random.Random(0)
    wrong = []
    for block in corpus().talk:
        for row in block.rows:
            for template in block.get("A"):
                bound = dict(row, template="word:")
                text = fill(template, bound, rng)
                expect = expected(block, bound, rng)
                if expect and not any(x.lower() in text.lower() for x in expect):
                    wrong.append(f"{block.file}: {text!r} holds none of {expect}")
    if wrong:
        raise ValueError("\n".join(wrong))
