"""Calls of the form that their tools ask for: random outputs of the grammars are what the parsers
read, whole and valid."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from engine.errors import RequestError
from engine.grammar import Grammar
from engine.matcher import Grammars, Matcher
from engine.parsing.answers import AnswerFormat
from engine.parsing.formats import CALLS, answer_format
from engine.parsing.parser import Parser
from engine.parsing.parts import Folded
from engine.parsing.structure import after_thinking, answer
from engine.structured_outputs import StructuredOutputsParams
from engine.tokenizer import Tokenizer
from tests.support.grammar_walks import walk
from tests.support.tiny_tokenizer import save_byte_tokenizer

DSML = "｜DSML｜"
CITY = {"enum": ["Paris", "Rome"]}
SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": CITY, "days": {"type": "array", "items": {"$ref": "#/$defs/day"},
                                              "maxItems": 2}},
        "required": ["city"], "additionalProperties": False,
        "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
    "get_time": {"type": "object", "additionalProperties": False},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


def form_of(name: str) -> AnswerFormat:
    form = answer_format(name, "openai" if name == "openai" else "qwen3", "", True)
    assert form is not None
    return form


NAMES = [name for name in (*CALLS, "openai") if form_of(name).layouts]
ASCII = [name for name in NAMES if all(tag.isascii() for tag in form_of(name).tags)]


class Model:
    """A tokenizer for a format, whose grammars are walked."""

    def __init__(self, folder: Path, marks: list[str]) -> None:
        save_byte_tokenizer(folder)
        whole = PreTrainedTokenizerFast.from_pretrained(folder)
        whole.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
        whole.save_pretrained(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.grammars = Grammars(self.tokenizer, 256)

    def matcher(self, form: Any) -> Matcher:
        params = StructuredOutputsParams(structural_tag={"format": form})
        return self.grammars.matcher(Grammar.of(params))

    def walks(self, form: Any, begin: str = "", count: int = 12, end: int = 1) -> list[str]:
        """Texts that random outputs of a form are, after ``begin``."""
        start, rng = self.matcher(form), np.random.default_rng(0)
        ids = self.tokenizer.encode(begin, False)
        assert start.consume(ids), start.error
        decoder = self.tokenizer.backend.byte_decoder
        assert decoder is not None
        texts = []
        for _ in range(count):
            found = walk(
                self.grammars, Matcher(start.inner.deep_copy()), decoder.all, rng, 400, end
            )
            if found is not None:
                texts.append(b"".join(decoder.all[i] for i in [*ids, *found]).decode())
        return texts


def read(form: AnswerFormat, text: str, opened: bool = False) -> Folded:
    parser = Parser(form, TOOLS, opened)
    return Folded().add(parser.push(text) + parser.finish(cut=False))


def check_calls(form: AnswerFormat, text: str, opened: bool = False) -> Folded:
    folded = read(form, text, opened)
    assert folded.calls, text
    for call in folded.calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return folded


def marks_of(form: AnswerFormat) -> list[str]:
    """The special tokens that a checkpoint with such tags would have."""
    return (
        [DSML]
        if any(DSML in tag for tag in form.tags)
        else [tag for tag in form.tags if tag != "{"]
    )


CASES = [(name, True) for name in NAMES] + [(name, False) for name in ASCII]


@pytest.mark.parametrize("name, special", CASES, ids=str)
def test_forced_calls_are_read_and_valid(tmp_path: Path, name: str, special: bool) -> None:
    form = form_of(name)
    model = Model(tmp_path, marks_of(form) if special else [])
    several = False
    for one in (True, False):
        made = answer(form.layouts, SCHEMAS, True, one, None)
        texts = model.walks(made)
        assert len(texts) > 4
        for text in texts:
            folded = check_calls(form, text)
            assert folded.content.strip() == "" and (not one or len(folded.calls) == 1)
            several |= len(folded.calls) > 1
    first = form.layouts[0]
    assert several or (first.between is None and first.apart is None)


@pytest.mark.parametrize("name, special", CASES, ids=str)
def test_text_is_free_up_to_a_call(tmp_path: Path, name: str, special: bool) -> None:
    form = form_of(name)
    model = Model(tmp_path, marks_of(form) if special else [])
    made = answer(form.marked, SCHEMAS, False, False, None)
    start = model.matcher(made)
    text = "Hello, 1 + 1 is { no call }"
    if name == "openai":
        text = f"<|channel|>final<|message|>{text}<|end|><|start|>assistant"
    matcher = Matcher(start.inner.deep_copy())
    assert matcher.consume(model.tokenizer.encode(text, False)) and matcher.accepting
    for layout in form.marked:
        before = text if layout.trigger else ""
        if name == "openai":
            before += "<|channel|>commentary "
        for found in model.walks(made, before + (layout.open or "{"), count=4, end=9):
            folded = check_calls(form, found)
            assert folded.content.startswith(before[:5]) or name == "openai"
        wrong = model.tokenizer.encode(f"{before}{layout.begin(None)}no_tool", False)
        assert not Matcher(start.inner.deep_copy()).consume(wrong), layout


def test_calls_or_an_answer_in_json_come_after_free_thinking(tmp_path: Path) -> None:
    """And no thinking that the prompt has not begun is needed."""
    content = {"type": "json_schema", "json_schema": {"const": {"a": [1]}}}
    for name, special in [("hermes", True), ("hermes", False), ("qwen3_coder", False)]:
        form = form_of(name)
        model = Model(tmp_path, marks_of(form) if special else [])
        made = answer(form.layouts, SCHEMAS, False, False, content)
        thought = "<think>{ so <tool_call> it is" if name == "hermes" else "<think>{ so"
        for opened in (False, True):
            whole = after_thinking(made, form.thoughts, form.unthinkable, opened)
            begin = thought.removeprefix("<think>") if opened else thought
            texts = model.walks(whole, f"{begin}</think>\n\n", count=16, end=9)
            if not opened:
                texts += model.walks(whole, count=16, end=9)
            answers, calls = 0, 0
            for text in texts:
                folded = read(form, text, opened)
                assert not text.startswith(begin) or folded.reasoning == thought[7:]
                calls += bool(folded.calls)
                if not folded.calls:
                    answers += json.loads(folded.content) == {"a": [1]}
                else:
                    check_calls(form, text, opened)
            assert answers + calls == len(texts) and answers and calls


def test_what_cannot_be_enforced_is_named() -> None:
    schema = {"properties": {"city": {"type": "string", "pattern": "a+"}}}
    with pytest.raises(RequestError, match="pattern of 'city' cannot be enforced"):
        answer(form_of("qwen3_coder").layouts, {"f": schema}, True, True, None)
    free = {"properties": {"city": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    assert answer(form_of("qwen3_coder").layouts, {"f": free}, True, True, None)
    assert not form_of("pythonic").layouts and not form_of("gemma4").layouts
