"""Where tokens begin in a choice's text, for tokenizers of every kind."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.sampling_params import SamplingParams
from engine.text import OutputText
from engine.tokenizer import Tokenizer
from router.offsets import TextOffsets
from tests.unit import text_checkpoints as checkpoints

MAKES = [checkpoints.byte_level, checkpoints.llama, checkpoints.gemma, checkpoints.t5,
         checkpoints.bert, checkpoints.byte_level_and_more]  # fmt: skip


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("text", checkpoints.TEXTS[:4])
def test_the_offsets_of_an_output_index_its_text(make: Callable[[], Path], text: str) -> None:
    tokenizer = Tokenizer.load(make())
    prompt = tokenizer.encode("Hello,")
    special = tokenizer.all_special_ids[-1]
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids[3:3] = [special, special]  # of which the text shows nothing
    sampling = SamplingParams()
    output = OutputText(tokenizer, prompt, sampling)
    shown: list[tuple[int, str]] = []  # what was there before each token, and what it brought
    for token_id in ids:
        shown.append((len(output.text), output.push([token_id]).text))
    output.finish()
    offsets = TextOffsets(tokenizer, sampling, prompt)
    halves = offsets.of_output(ids[:7], None) + offsets.of_output(ids[7:], len(output.text))
    assert halves == [before for before, _ in shown]
    for offset, (_, piece) in zip(halves, shown, strict=True):
        assert output.text[offset:].startswith(piece)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    "text", ["Hello, world!", "  The capital of France", "你好，世界", "a é b"]
)
def test_the_offsets_of_an_echo_index_what_was_sent(make: Callable[[], Path], text: str) -> None:
    tokenizer = Tokenizer.load(make())
    ids = tokenizer.encode(text)
    offsets = TextOffsets(tokenizer, SamplingParams(), ids)
    begins = offsets.of_prompt(ids, text)
    assert begins == sorted(begins) and begins[0] >= 0 and begins[-1] <= len(text)
    lost = set()
    for k, (token_id, begin) in enumerate(zip(ids, begins, strict=True)):
        [(piece, _)] = tokenizer.token_texts([token_id], ids[:k])
        there, piece = (
            unicodedata.normalize("NFKC", part).lstrip() for part in (text[begin:], piece)
        )
        if not there.startswith(piece) and "\ufffd" not in piece:
            lost.add(token_id)
    # A begin token was never sent; what is not in the vocabulary is no text of its own.
    assert lost <= tokenizer.backend.added_ids
    assert offsets.of_output([], None) == []
    # The output goes on where the text ends, whatever the tokenizer has put before it.
    (at,) = offsets.of_output(ids[-1:], None)
    assert at == len(text)


def test_a_begin_token_that_is_not_sent_moves_nothing() -> None:
    tokenizer = Tokenizer.load(checkpoints.byte_level())
    text = "The capital<|im_end|> of France"
    ids = tokenizer.encode(text)
    begins = TextOffsets(tokenizer, SamplingParams(), ids).of_prompt(ids, text)
    assert begins[:2] == [0, 0] and ids[0] == tokenizer.bos_token_id
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert begins[ids.index(end)] == text.index("<|im_end|>")  # special, but it was sent
    assert begins[ids.index(end) + 1] == text.index(" of France")


def test_what_a_stop_string_cut_off_begins_at_the_end() -> None:
    tokenizer = Tokenizer.load(checkpoints.byte_level())
    ids = tokenizer.encode("Hello, world!", add_special_tokens=False)
    begins = TextOffsets(tokenizer, SamplingParams(), []).of_output(ids, len("Hello"))
    assert begins[0] == 0 and max(begins) == begins[-1] == len("Hello")
