"""Streams of text against whole decodes, and stop strings against the plainest search."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertGenerationTokenizer, PreTrainedTokenizerFast

from engine.sampling_params import SamplingParams
from engine.text import OutputText, StopStrings, detokenizer
from engine.tokenizer import Tokenizer
from tests.unit import text_checkpoints as checkpoints

BROKEN = "\ufffd"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def slow_folder() -> Path:
    """A tokenizer that transformers runs in Python over sentencepiece."""
    path = checkpoints.folder()
    model = checkpoints.sentencepiece_model("unigram")
    BertGenerationTokenizer(vocab_file=str(model)).save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "bert-generation"}')
    return path


FOLDERS = {
    "byte-level": checkpoints.byte_level,
    "llama": checkpoints.llama,
    "gemma": checkpoints.gemma,
    "t5": checkpoints.t5,
    "bert": checkpoints.bert,
    "slow": slow_folder,
    "bytes by windows": checkpoints.byte_level_and_more,
}


@functools.cache
def load(name: str) -> Tokenizer:
    return Tokenizer.load(FOLDERS[name]())


def split(items: list[int], cuts: list[int]) -> list[list[int]]:
    ends = sorted({min(cut, len(items)) for cut in cuts} | {len(items)})
    return [items[a:b] for a, b in itertools.pairwise([0, *ends])]


def stream(tokenizer: Tokenizer, prompt: list[int], chunks: list[list[int]], **skip: Any) -> str:
    made = detokenizer(tokenizer, prompt, **skip)
    return "".join([*(made.push(chunk) for chunk in chunks), made.finish()])


def joins(before: str, given: str, whole: str) -> bool:
    """If the text given goes on from the prompt's, whose last character it may have completed."""
    return whole in [before.removesuffix(BROKEN * count) + given for count in range(4)]


texts = st.text(max_size=20) | st.lists(
    st.sampled_from([word for text in checkpoints.TEXTS for word in text.split(" ")] + [" ", "  "])
    | st.sampled_from(
        ["<|im_end|>", "<think>", "né", "<tool>", "</s>", "👩‍👩‍👧", "e\u0301", "\x00"]
    ),
    max_size=8,
).map(" ".join)
cuts = st.lists(st.integers(0, 40), max_size=10)
many = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize("name", ["byte-level", "llama", "gemma", "t5", "bert", "slow"])
@many
@given(prompt=texts, output=texts, cuts=cuts, skip=st.booleans())
def test_text_streams_as_it_decodes(
    name: str, prompt: str, output: str, cuts: list[int], skip: bool
) -> None:
    tokenizer = load(name)
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(output, add_special_tokens=False)
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=skip)
    before = tokenizer.decode(prompt_ids, skip_special_tokens=skip)
    if not whole.startswith(before):  # slow tokenizers strip a text's end
        before = before.rstrip()
    given = stream(tokenizer, prompt_ids, split(ids, cuts), skip_special_tokens=skip)
    assert joins(before, given, whole)


@pytest.mark.parametrize("name", ["byte-level", "t5", "bert"])
@many
@given(data=st.data(), cuts=cuts, skip=st.booleans())
def test_any_tokens_stream_as_they_decode(
    name: str, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    tokenizer = load(name)
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=20)
    prompt, ids = data.draw(any_ids), data.draw(any_ids)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    given = stream(tokenizer, prompt, split(ids, cuts), skip_special_tokens=skip)
    assert joins(before, given, whole)


@many
@given(data=st.data(), cuts=cuts)
def test_byte_fallback_of_any_tokens(data: st.DataObject, cuts: list[int]) -> None:
    """Against the sentencepiece library itself, on bytes that are mostly no UTF-8."""
    tokenizer = load("llama")
    library = sentencepiece.SentencePieceProcessor(str(checkpoints.sentencepiece_model("bpe")))
    size = library.get_piece_size()
    space = library.piece_to_id("<0x20>")
    assert (tokenizer.decode([space]), library.decode([space])) == ("", " ")

    def decode(ids: list[int]) -> str:
        # A text's first space is taken away by tokenizers (so by transformers and vLLM) even where
        # a byte token wrote it, by the library only where a word did.
        text = library.decode(ids)
        return text.removeprefix(" ") if ids[:1] == [space] else text

    # Without the control tokens, which end a run of bytes there; bytes are the ids after them.
    any_ids = st.lists(st.integers(3, size - 1) | st.integers(3, 262), max_size=20)
    prompt, ids = data.draw(any_ids), data.draw(any_ids)
    whole, before = decode(prompt + ids), decode(prompt)
    given = stream(tokenizer, prompt, split(ids, cuts))
    assert joins(before, given, whole)


@pytest.mark.parametrize("name", ["byte-level", "llama"])
@many
@given(data=st.data())
def test_text_is_given_as_soon_as_it_is_certain(name: str, data: st.DataObject) -> None:
    """After each token: all that decodes, but for one unfinished character."""
    tokenizer = load(name)
    library = sentencepiece.SentencePieceProcessor(str(checkpoints.sentencepiece_model("bpe")))
    prompt = tokenizer.encode("Hi")
    ids = tokenizer.encode(data.draw(texts), add_special_tokens=False)
    made = detokenizer(tokenizer, prompt)
    given = ""
    for k, token_id in enumerate(ids, 1):
        given += made.push([token_id])
        known = prompt + ids[:k]
        now = library.decode(known) if name == "llama" else tokenizer.decode(known, True)
        assert now.removeprefix("Hi") in [given + BROKEN * count for count in range(4)]


@pytest.mark.parametrize("name", ["byte-level", "bytes by windows"])
def test_half_a_character_is_held_back(name: str) -> None:
    tokenizer = load(name)
    family = "👩‍👩‍👧‍👦"
    ids = tokenizer.encode(family + "e\u0301", add_special_tokens=False)
    made = detokenizer(tokenizer, [])
    pieces = [made.push([token_id]) for token_id in ids]
    assert "".join(pieces) == family + "e\u0301"
    assert "" in pieces and not any(BROKEN in piece for piece in pieces)
    assert made.finish() == ""
    made = detokenizer(tokenizer, [])
    assert made.push(ids[:1]) == ""
    assert made.finish() == BROKEN


def test_broken_bytes_show_as_in_each_library() -> None:
    """Two bytes of a character of three: one U+FFFD in Unicode's way, two in SentencePiece's."""
    library = sentencepiece.SentencePieceProcessor(str(checkpoints.sentencepiece_model("bpe")))
    ids = [library.piece_to_id(piece) for piece in ("a", "<0xE4>", "<0xBD>", "a", "<0xE4>")]
    assert stream(load("llama"), [], [[i] for i in ids]) == library.decode(ids)
    assert library.decode(ids) == "a" + 2 * BROKEN + "a" + BROKEN
    ids = [load("byte-level").backend.token_to_id(piece) or 0 for piece in ("a", "ä", "½", "a")]
    assert stream(load("byte-level"), [], [[i] for i in ids]) == "a" + BROKEN + "a"
    assert load("byte-level").decode(ids) == "a" + BROKEN + "a"


def test_special_tokens_within_a_character() -> None:
    tokenizer = load("byte-level")
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) > 1
    broken = [ids[0], 1, *ids[1:]]
    assert stream(tokenizer, [], [broken]) == "😀"  # skipped: the bytes meet
    shown = stream(tokenizer, [], [[i] for i in broken], skip_special_tokens=False)
    assert shown == tokenizer.decode(broken)
    assert "<|end|>" in shown and BROKEN in shown


def test_resumed_output_goes_on_where_it_was() -> None:
    for name in ("byte-level", "llama"):
        tokenizer = load(name)
        prompt = tokenizer.encode("Hello")
        ids = tokenizer.encode(" wörld 👍🏽 你好", add_special_tokens=False)
        for k in range(len(ids) + 1):
            first = detokenizer(tokenizer, prompt)
            given = first.push(ids[:k])
            assert given + stream(tokenizer, prompt + ids[:k], [ids[k:]]) == stream(
                tokenizer, prompt, [ids]
            )


def test_first_space_belongs_to_the_tokenizer_only_at_the_start() -> None:
    tokenizer = load("llama")
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert stream(tokenizer, [], [hello]) == "Hello"
    assert stream(tokenizer, [1], [hello]) == "Hello"  # <s> is skipped
    assert stream(tokenizer, [1], [hello], skip_special_tokens=False) == " Hello"
    assert stream(tokenizer, hello, [hello]) == " Hello"
    assert stream(load("gemma"), [], [hello]) == " Hello"


def test_window_looks_behind_special_tokens() -> None:
    tokenizer = load("t5")
    word = tokenizer.encode("Paris", add_special_tokens=False)
    prompt = [*word, *[1] * 30]
    assert stream(tokenizer, prompt, [word]) == " Paris"


def test_against_transformers() -> None:
    """The reference of the tests above is our decode; here it is transformers'."""
    theirs = PreTrainedTokenizerFast.from_pretrained(checkpoints.byte_level())
    ids = theirs.encode(" ".join(checkpoints.TEXTS))
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip)
        chunks = [[i] for i in ids]
        assert stream(load("byte-level"), [], chunks, skip_special_tokens=skip) == expected


# Stop strings


def first_stop(text: str, stops: list[str], checked: range) -> tuple[int, str] | None:
    """(end, stop string) of the stop string that is complete first, by trying all."""
    for end in checked:
        for stop in stops:
            if text[:end].endswith(stop):
                return end, stop
    return None


letters = st.text("ab", max_size=6)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(letters, max_size=8),
    unchecked=st.integers(0, 3),
    stops=stop_lists,
    include=st.booleans(),
)
def test_stop_strings(pieces: list[str], unchecked: int, stops: list[str], include: bool) -> None:
    finder = StopStrings(stops, include)
    given = text = ""
    for k, piece in enumerate(pieces):
        start = len(text)
        text += piece
        new, stopped = finder.push(piece, check=k >= unchecked)
        given += new
        ends = range(start + 1, len(text) + 1) if k >= unchecked else range(0)
        expected = first_stop(text, stops, ends)
        assert (expected is None) == (stopped is None)
        if expected is not None:
            end, stop = expected
            assert stopped == stop
            assert given == text[: end if include else end - len(stop)]
            return
        begun = [i for i in range(len(text)) for s in stops if s[:-1].startswith(text[i:])]
        assert given == (text if include else text[: min(begun, default=len(text))])
    assert given + finder.finish() == text


@settings(max_examples=150, deadline=None)
@given(
    output=st.text("abé你😀 ", max_size=12),
    stops=st.lists(st.text("ab你😀 ", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
    cuts=cuts,
    name=st.sampled_from(["byte-level", "llama", "t5"]),
)
def test_output_text(
    output: str, stops: list[str], include: bool, min_tokens: int, cuts: list[int], name: str
) -> None:
    tokenizer = load(name)
    prompt = tokenizer.encode("a b")
    ids = tokenizer.encode(output, add_special_tokens=False)
    plain = detokenizer(tokenizer, prompt)
    ends = list(itertools.accumulate((len(plain.push([i])) for i in ids), initial=0))
    whole = stream(tokenizer, prompt, [ids])
    checked = range(ends[min(min_tokens, len(ids))] + 1, ends[-1] + 1)
    expected = first_stop(whole, stops, checked)

    params = SamplingParams(
        stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=100
    )
    out = OutputText(tokenizer, prompt, params)
    given, consumed, stopped = "", 0, None
    for chunk in split(ids, cuts):
        delta = out.push(chunk)
        given += delta.text
        consumed += delta.consumed
        assert delta.consumed == len(chunk) or delta.stopped
        assert out.text == given
        if stopped := delta.stopped:
            break
    if expected is None:
        assert stopped is None and consumed == len(ids)
        assert given + out.finish() == whole == out.text
    else:
        end, stop = expected
        assert stopped == stop
        assert given == whole[: end if include else end - len(stop)]
        assert ends[consumed - 1] < end <= ends[consumed]  # the token that completes it


def test_stop_string_is_held_back_token_by_token() -> None:
    tokenizer = load("byte-level")
    out = OutputText(tokenizer, [], SamplingParams(stop=["\nUser:", "\n\n"]))
    deltas = [out.push(tokenizer.encode(c, add_special_tokens=False)) for c in "Hi\nUse \nUser: x"]
    assert [delta.text for delta in deltas[:14]] == [
        "H", "i", "", "", "", "", "\nUse ", "", "", "", "", "", "", " ",
    ][:13] + [deltas[13].text]  # fmt: skip
    assert deltas[12].stopped == "\nUser:" and out.text.startswith("Hi\nUse ")


def test_ties_go_to_the_first_of_the_list() -> None:
    for stops, text in ((["bc", "abc"], "xa"), (["abc", "bc"], "x")):
        finder = StopStrings(stops, include=False)
        given, stopped = finder.push("xabcd")
        assert (given, stopped) == (text, stops[0])


def test_stop_token_has_no_text_of_its_own() -> None:
    tokenizer = load("byte-level")
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    end = tokenizer.eos_token_id
    assert end is not None
    cases: list[tuple[dict[str, bool], int, str]] = [
        ({}, end, ""),
        ({"skip_special_tokens": False}, end, ""),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, end, "<|end|>"),
        ({"include_stop_str_in_output": True}, end, ""),  # skipped as a special token
        ({}, ids[0], ""),
        ({"include_stop_str_in_output": True}, ids[0], tokenizer.decode(ids[:1])),
    ]
    for options, token_id, shown in cases:
        for stop in ((), ("never",)):
            out = OutputText(tokenizer, [], SamplingParams(stop=stop, **options))
            assert out.push(ids).text == "Hello"
            delta = out.push([token_id], ended_by_stop_token=True)
            assert (delta.text + out.finish(), delta.consumed) == (shown, 1)
            assert out.text == "Hello" + shown


def test_held_text_comes_when_a_stop_token_ends_the_output() -> None:
    tokenizer = load("byte-level")
    out = OutputText(tokenizer, [], SamplingParams(stop=["world"]))
    assert out.push(tokenizer.encode("a wor", add_special_tokens=False)).text == "a "
    assert out.push([1], ended_by_stop_token=True) == ("", None, 1)
    assert out.finish() == "wor"
    assert out.text == "a wor"


def test_without_detokenizing_there_is_no_text() -> None:
    out = OutputText(None, [1, 2], SamplingParams(detokenize=False))
    assert out.push([5, 6, 7]) == ("", None, 3)
    assert (out.finish(), out.text) == ("", "")


def test_spaces_between_special_tokens() -> None:
    tokenizer = load("bert")
    ids = [2, 1, *tokenizer.encode("it", add_special_tokens=False), 1, 2]
    for spaces in (True, False):
        expected = tokenizer.decode(ids, spaces_between_special_tokens=spaces)
        given = stream(
            tokenizer, [], [[i] for i in ids], skip_special_tokens=False,
            spaces_between_special_tokens=spaces,
        )  # fmt: skip
        assert given == expected
    assert expected == "[CLS][SEP] it [SEP][CLS]"
