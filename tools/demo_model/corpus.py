"""Draws the training documents of the demo model, and the evaluation questions.

`documents(seed, count)` draws from the text files (talk.py) and from tools, JSON and thinking. The
same seed always gives the same documents, whatever the number of processes.

    python tools/demo_model/corpus.py --show 20                   print some documents
    python tools/demo_model/corpus.py --show 5 --kind tools       print some of one kind
    python tools/demo_model/corpus.py --questions FILE            write the evaluation questions
    python tools/demo_model/corpus.py --agent-questions FILE      and those of the other kinds
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import json_chats
import talk
import thoughts
import tool_chats
from agent_questions import agent_questions

END = "<|endoftext|>"
CHUNK = 1000  # documents drawn from one random stream
# Kind of documents to what draws one, and to its share of all.
KINDS: dict[str, tuple[Callable[[random.Random], str], float]] = {
    "talk": (talk.document, 0.76),
    "tools": (tool_chats.conversation, 0.15),
    "json": (json_chats.conversation, 0.05),
    "thinking": (thoughts.conversation, 0.04),
}


class Document(NamedTuple):
    """A training document, ended by END."""

    kind: str
    text: str


def document(rng: random.Random, kind: str = "") -> Document:
    if not kind:
        [kind] = rng.choices(list(KINDS), [share for _, share in KINDS.values()])
    return Document(kind, KINDS[kind][0](rng) + END)


def chunk(seed: int, kind: str, number: int) -> list[Document]:
    rng = random.Random(f"{seed}/{kind}{number}")
    return [document(rng, kind) for _ in range(CHUNK)]


def documents(seed: int, count: int, processes: int = 1, kind: str = "") -> list[Document]:
    """`count` documents (rounded up to whole chunks), of one kind or of all."""
    numbers = range(-(-count // CHUNK))
    draw_chunk = functools.partial(chunk, seed, kind)
    if processes < 2:
        return [drawn for number in numbers for drawn in draw_chunk(number)]
    with ProcessPoolExecutor(processes) as pool:
        return [drawn for chunks in pool.map(draw_chunk, numbers) for drawn in chunks]


def write(path: str, questions: list[dict[str, object]]) -> None:
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    Path(path).write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} questions in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N documents")
    parser.add_argument("--kind", choices=list(KINDS), default="", help="those of one kind")
    parser.add_argument("--questions", metavar="FILE", help="write the evaluation questions")
    parser.add_argument("--agent-questions", metavar="FILE",
                        help="write those about tools, JSON and thinking")  # fmt: skip
    args = parser.parse_args()
    talk.check()
    for drawn in documents(args.seed, args.show, kind=args.kind)[: args.show]:
        print(drawn.text, end="\n\n")
    if args.questions:
        write(args.questions, talk.questions(args.seed))
    if args.agent_questions:
        write(args.agent_questions, agent_questions(args.seed))


if __name__ == "__main__":
    main()
