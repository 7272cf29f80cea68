"""Bounds on thinking: what is forced follows from an output's tokens, however they cut its text."""

import random

import pytest

from engine.errors import RequestError
from engine.parsing.answers import thinking_budget
from engine.parsing.formats import answer_format
from engine.thinking import ThinkingCount


def count_of(name: str, most: int, opened: bool, calls: str = "none") -> ThinkingCount:
    """One that writes a closer byte by byte."""
    budget = thinking_budget(answer_format(calls, name, "", True), most, opened)
    return ThinkingCount(budget, budget.closers[0].encode())


def run(count: ThinkingCount, tokens: list[str]) -> str:
    """The output of a model that says ``tokens``, but for those that are forced."""
    said, left = b"", [token.encode() for token in tokens]
    while left or count.forced is not None:
        token = left.pop(0) if count.forced is None else bytes([count.forced])
        count.take(token)
        said += token
    return said.decode()


def cut(text: str, rng: random.Random) -> list[str]:
    at = sorted(rng.sample(range(1, len(text)), rng.randint(0, len(text) // 2)))
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize("most", range(5))
def test_the_bound_is_in_tokens(most: int) -> None:
    tokens = ["\n", "I ", "think", " so"]
    thought = "".join(tokens[:most])
    more = tokens[most:]
    closed = thought + "</think>" + "".join(more)
    assert run(count_of("qwen3", most, True), tokens) == closed
    assert run(count_of("qwen3", most, False), ["\n", "<think>", *tokens]) == "\n<think>" + closed
    assert run(count_of("qwen3", most, False), ["<thi", "nk>", *tokens]) == "<think>" + closed


@pytest.mark.parametrize("text", ["Let me see.</think>\n\nI <think> so", "</think></think>Yes"])
def test_thinking_that_ends_in_time_is_left_alone(text: str) -> None:
    rng = random.Random(text)
    for _ in range(50):
        assert run(count_of("qwen3", 11, True), cut(text, rng)[:11]) in text
        assert run(count_of("qwen3", len(text), True), cut(text, rng)) == text


def test_what_is_said_is_no_thinking() -> None:
    """However many tokens it has, and whatever stands in it."""
    rng = random.Random(0)
    for text in ("I say <think> and go on and on.", "<thin ice", "  \n", "<tool_call>{}"):
        for _ in range(20):
            assert run(count_of("qwen3", 0, False), cut(text, rng)) == text


def test_thinking_that_is_begun_anew_has_what_is_left() -> None:
    tokens = ["<think>", "a", "b", "</think>", "\n", "<think>", "c", "d", "</think>", "e"]
    assert run(count_of("qwen3", 3, False), tokens) == (
        "<think>ab</think>\n<think>c</think>d</think>e"
    )


def test_a_call_ends_thinking_where_it_does_for_the_parser() -> None:
    section = "<|tool_calls_section_begin|>"
    tokens = ["Hm", section, *"functions.look:0"]
    assert run(count_of("kimi_k2", 2, True, "kimi_k2"), tokens) == "".join(tokens)
    assert "</think>" in run(count_of("kimi_k2", 2, True), tokens)


def test_a_character_is_finished() -> None:
    count = count_of("qwen3", 1, True)
    for byte in "é".encode():
        assert count.forced is None
        count.take(bytes([byte]))
    assert count.forced == ord("<")
    broken = count_of("qwen3", 1, True)  # no character is to come of it
    broken.take(b"\xc3")
    broken.take(b"a")
    assert broken.forced == ord("<")


def test_it_follows_from_the_tokens() -> None:
    """One that takes up an output anywhere goes on as the first."""
    said = run(count_of("openai", 4, False), ["<|channel|>analysis<|message|>", *"thoughts"])
    assert said == "<|channel|>analysis<|message|>thou<|end|><|start|>assistantghts"
    tokens = [b"<|channel|>analysis<|message|>", *(bytes([byte]) for byte in said[30:].encode())]
    forced = []
    whole = count_of("openai", 4, False)
    for token in tokens:
        forced.append(whole.forced)
        whole.take(token)
    for stop in range(len(tokens)):
        again = count_of("openai", 4, False)
        for token in tokens[:stop]:
            again.take(token)
        assert again.forced == forced[stop]


def test_a_model_that_is_not_known_to_think_is_refused() -> None:
    for form in (None, answer_format("hermes", "none", "", True)):
        with pytest.raises(RequestError, match="^thinking_token_budget: it is not known how"):
            thinking_budget(form, 5, False)
