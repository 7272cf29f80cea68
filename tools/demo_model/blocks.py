"""The blocks of the text files in `text/`: parsed, weighted, drawn from."""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

TEXT = Path(__file__).parent / "text"
TURN = "<|im_start|>{}\n{}<|im_end|>\n"

# Files whose answers are facts that also stand alone as plain text, and their share of the talk.
FACTS = {"manta.txt": 3.0, "tables.txt": 0.35, "world.txt": 1.6, "sums": 0.35}
TALK = {"social.txt": 1.6, "jokes.txt": 1.0, "unknown.txt": 1.0, "stories.txt": 0.5}


@dataclass
class Block:
    """One paragraph of a text file: lines by their letter, and the table it refers to."""

    file: str
    lines: dict[str, list[str]] = field(default_factory=dict)
    script: list[tuple[str, str]] = field(default_factory=list)  # dialogue lines in order
    rows: list[dict[str, str]] = field(default_factory=lambda: [{}])

    def get(self, key: str) -> list[str]:
        return self.lines.get(key, [])

    def choices(self, key: str) -> list[str]:
        return [part for line in self.get(key) for part in split(line)]

    @property
    def personal(self) -> bool:
        return "personal" in self.get("K")

    @property
    def weight(self) -> float:
        share = FACTS.get(self.file, TALK.get(self.file, 1.0))
        return share * len(self.rows) * float(self.lines.get("W", ["1"])[0])

    @property
    def plain(self) -> list[str]:
        """The plain-text forms of a fact: the T lines, or else the answers."""
        if self.file not in FACTS:
            return []
        return [t for t in self.get("T") or self.get("A") if t != "-"]


def words(line: str) -> list[str]:
    return line.split()


def split(line: str) -> list[str]:
    return [part.strip() for part in line.split(" | ")]


def parse(file: str, text: str) -> list[Block]:
    """Reads blocks, which empty lines separate; `@=` refers to the table of the block before."""
    blocks: list[Block] = []
    rows: list[dict[str, str]] = [{}]
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [ln for ln in paragraph.splitlines() if ln.strip() and not ln.startswith("#")]
        if not lines:
            continue
        block = Block(file)
        columns: list[str] = []
        for line in lines:
            key, _, rest = line.partition(" ")
            if key == "@=":
                block.rows = rows
            elif key == "@":
                columns, block.rows = split(rest), []
            elif key == "-":
                values = split(rest)
                if len(values) > len(columns):
                    raise ValueError(f"{file}: {len(columns)} columns, but {line!r}")
                block.rows.append(dict(zip(columns, values, strict=False)))
            elif key in ("U:", "B:", "Y:", "..."):
                block.script.append((key.rstrip(":"), rest))
            elif re.fullmatch(r"[A-Z]:", key):
                block.lines.setdefault(key[0], []).append(rest)
            else:
                raise ValueError(f"{file}: not a line of a block: {line!r}")
        rows = block.rows
        blocks.append(block)
    return blocks


def sums() -> str:
    """Blocks for arithmetic, counting, dates and letters, in the format of the text files."""
    names = words(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
        " fifteen sixteen seventeen eighteen nineteen twenty"
    )
    days = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
    months = words(
        "January February March April May June July August September October November December"
    )
    letters = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    blocks: list[str] = []

    def table(columns: str, rows: list[str], *lines: str) -> None:
        blocks.append("\n".join([f"@ {columns}", *(f"- {row}" for row in rows), *lines]))

    def operation(rows: list[str], name: str, sign: str, asks: str, weight: float) -> None:
        table(
            "a | b | c",
            rows,
            f"Q: What is {{a}} {name} {{b}}? | {{a}} {sign} {{b}} | {{a}}{sign}{{b}} | "
            f"What is {{a}} {sign} {{b}}? | How much is {{a}} {name} {{b}}? | "
            f"{{a}} {sign} {{b}} = ? | {{a}} {name} {{b}} | Calculate {{a}} {sign} {{b}}. | {asks}",
            f"H: How much is {{a}} {sign} {{b}}?",
            f"F: And {{a}} {name} {{b}}? | And {{a}} {sign} {{b}}?",
            f"A: {{a}} {name} {{b}} is {{c}}.",
            "X: is {c}.",
            f"W: {weight}",
        )

    small = range(21)
    operation([f"{a} | {b} | {a + b}" for a in small for b in small], "plus", "+",
              "Add {a} and {b}. | What is the sum of {a} and {b}?", 0.5)  # fmt: skip
    operation([f"{a} | {b} | {a - b}" for a in small for b in range(a + 1)], "minus", "-",
              "Subtract {b} from {a}.", 0.5)  # fmt: skip
    operation([f"{a} | {b} | {a * b}" for a in range(13) for b in range(13)], "times", "*",
              "Multiply {a} by {b}. | {a} x {b}", 0.7)  # fmt: skip
    operation([f"{a * b} | {b} | {a}" for a in range(1, 11) for b in range(1, 11)],
              "divided by", "/", "Divide {a} by {b}.", 0.5)  # fmt: skip
    table(
        "a | b | c",
        [f"{names[a]} | {names[b]} | {names[a + b]}" for a in range(11) for b in range(11)],
        "Q: What is {a} plus {b}? | How much is {a} plus {b}? | {a} plus {b} | Add {a} and {b}.",
        "A: {A} plus {b} is {c}.",
        "X: is {c}",
        "W: 0.5",
    )
    table(
        "n | list",
        [f"{n} | {', '.join(map(str, range(1, n + 1)))}" for n in range(3, 31)],
        "Q: Count to {n}. | Count from 1 to {n}. | Can you count to {n}? | Please count to {n}. | "
        "Count from one to {n}. | Count up to {n}.",
        "F: And to {n}? | Now count to {n}.",
        "A: {list}.",
        "X: {list}",
        "W: 3",
    )
    table(
        "n | list",
        [f"{names[n]} | {', '.join(map(str, range(1, n + 1)))}" for n in range(3, 21)],
        "Q: Count to {n}. | Can you count to {n}? | Count from one to {n}.",
        "A: {list}.",
        "X: {list}",
        "W: 3",
    )
    table(
        "n | list",
        [f"{n} | {', '.join(map(str, range(n, -1, -1)))}" for n in range(3, 21)],
        "Q: Count backwards from {n}. | Count down from {n}. | Count backwards from {n} to 0.",
        "A: {list}.",
        "X: {list}",
    )
    table(
        "a | b",
        [f"{n} | {names[n]}" for n in small],
        "Q: How do you write {a} in words? | Write {a} in words. | Write the number {a} as a word.",
        "A: The number {a} is written {b}.",
        "X: {b}",
    )
    table(
        "n | kind",
        [f"{n} | {'odd' if n % 2 else 'even'}" for n in range(51)],
        "Q: Is {n} even or odd? | Is {n} an even number? | Is {n} an odd number? | "
        "Is the number {n} even?",
        "F: And {n}? | And is {n} even or odd?",
        "A: {n} is an {kind} number.",
        "X: {kind}",
    )
    table(
        "n | next | before",
        [f"{n} | {n + 1} | {n - 1}" for n in range(1, 100)],
        "Q: Which number comes after {n}? | What comes after {n}? | What number follows {n}?",
        "F: And after {n}?",
        "A: After {n} comes {next}.",
        "X: comes {next}",
        "W: 0.5",
    )
    table(
        "a | b | big",
        [f"{a} | {b} | {max(a, b)}" for a in range(0, 101, 5) for b in range(1, 101, 7) if a != b],
        "Q: Which is larger, {a} or {b}? | Which number is larger, {a} or {b}? | "
        "What is bigger, {a} or {b}? | Which is more, {a} or {b}?",
        "A: {big} is larger.",
        "X: {big} is",
        "W: 0.3",
    )
    for what, items in (("day", days), ("month", months)):
        pairs = [f"{a} | {b}" for a, b in zip(items, items[1:] + items[:1], strict=True)]
        table(
            "a | b",
            pairs,
            f"Q: Which {what} comes after {{a}}? | What {what} comes after {{a}}? | "
            f"What comes after {{a}}? | Which {what} follows {{a}}? | What is the {what} "
            f"after {{a}}?",
            "F: And after {a}?",
            "A: {b} comes after {a}.",
            "X: {b} comes",
            "W: 2",
        )
        table(
            "b | a",
            pairs,
            f"Q: Which {what} comes before {{a}}? | What {what} comes before {{a}}? | "
            f"What comes before {{a}}? | What is the {what} before {{a}}?",
            "F: And before {a}?",
            "A: {b} comes before {a}.",
            "X: {b} comes",
            "W: 2",
        )
    table(
        "a | b",
        [f"{a} | {b}" for a, b in zip(letters, letters[1:], strict=False)],
        "Q: Which letter comes after {a}? | What letter comes after {a}? | What comes after {a} in "
        "the alphabet?",
        "F: And after {a}?",
        "A: The letter {b} comes after {a}.",
        "X: letter {b} comes",
    )
    lengths = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    table(
        "m | n",
        [f"{m} | {n}" for m, n in zip(months, lengths, strict=True)],
        "Q: How many days does {m} have? | How many days are in {m}? | How many days are there in "
        "{m}?",
        "F: And {m}?",
        "A: {m} has {n} days.",
        "X: {n}",
        "W: 2",
    )
    return "\n\n".join(blocks)


class Corpus:
    """The parsed text files."""

    def __init__(self) -> None:
        self.lists: dict[str, list[str]] = {}
        for line in (TEXT / "lists.txt").read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                name, _, values = line.partition(": ")
                self.lists[name] = split(values)
        self.lists["adj2"] = self.lists["adj"]
        self.blocks = parse("sums", sums())
        for path in sorted(TEXT.glob("*.txt")):
            if path.name != "lists.txt":
                self.blocks += parse(path.name, path.read_text(encoding="utf-8"))
        self.talk = [b for b in self.blocks if b.get("Q")]
        self.chain = [b for b in self.talk if not b.personal]
        self.facts = [b for b in self.blocks if b.plain]
        self.scenes = [b for b in self.blocks if b.get("S")]
        self.dialogues = [b for b in self.blocks if b.script]
        groups = (self.talk, self.chain, self.facts, self.scenes, self.dialogues)
        self.weights = {id(group): [b.weight for b in group] for group in groups}
        self.weights[id(self.facts)] = [
            b.weight * (0.2 if b.file == "sums" else 1) for b in self.facts
        ]

    def pick(self, group: list[Block], rng: random.Random) -> Block:
        return rng.choices(group, self.weights[id(group)])[0]


@functools.cache
def corpus() -> Corpus:
    return Corpus()
