"""From an engine's outcomes to a ``RequestOutput``, with a real byte-level tokenizer."""

import numpy as np

from engine.collector import Collector
from engine.continuation import begin
from engine.outcome import Outcome
from engine.outputs import RequestMetrics
from engine.plan import TokenLogprobs, ints
from engine.sampling_params import SamplingParams
from engine.sequence import FinishReason
from engine.tokenizer import Tokenizer
from tests.unit import text_checkpoints


def entry(*ids):
    """Log-probabilities of tokens in order: -1, -2, ..."""
    count = len(ids)
    return TokenLogprobs(ints(ids), -np.arange(1, count + 1, dtype=np.float32), ints(range(count)))


def collect(sampling, prompt, streaming=False):
    tokenizer = Tokenizer.load(text_checkpoints.byte_level())
    request = begin(request_id="r", prompt_token_ids=prompt, sampling=sampling)
    return Collector(request, None, tokenizer, RequestMetrics(0.0), streaming)


def take(collector, index=0, tokens=(), **more):
    """One outcome's text, and the completions whose text reached a stop string."""
    stopped = []
    position = len(collector.output.outputs[index].token_ids)
    found = collector.take([Outcome(index, position, list(tokens), **more)], stopped.append)
    return "".join(piece.text for piece in found), stopped


def pieces(text):
    return Tokenizer.load(text_checkpoints.byte_level()).encode(text, add_special_tokens=False)


def test_a_token_that_ends_a_character_shows_it_whole_in_the_logprobs():
    ids = pieces("\N{ROCKET}")
    assert len(ids) > 2  # a character of several tokens
    text = collect(SamplingParams(logprobs=0, prompt_logprobs=0), ids[:2])
    prompt_logprobs = [(1, [entry(ids[1])])]
    for number, token in enumerate(ids[2:]):
        last = number == len(ids) - 3
        reason = FinishReason.LENGTH if last else None
        take(
            text, 0, [token], logprobs=[entry(token)], prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
        )  # fmt: skip
        prompt_logprobs = None
    output = text.output
    shown = [logprobs[token].decoded_token for token, logprobs in
             zip(ids[2:], output.outputs[0].logprobs, strict=True)]  # fmt: skip
    assert shown == [""] * (len(ids) - 3) + ["\N{ROCKET}"]
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1][ids[1]].decoded_token == ""
    assert output.outputs[0].cumulative_logprob == -len(ids[2:])


def test_streamed_text_is_the_text_in_one_go():
    prompt, ids = pieces("Hello"), pieces(", world! \N{ROCKET} 你好")
    streamed, whole = (collect(SamplingParams(), prompt, streaming) for streaming in (True, False))
    parts = []
    for number, token in enumerate(ids):
        reason = FinishReason.LENGTH if number == len(ids) - 1 else None
        parts.append(take(streamed, 0, [token], finish_reason=reason)[0])
        take(whole, 0, [token], finish_reason=reason)
    expected = ", world! \N{ROCKET} 你好"
    assert "".join(parts) == streamed.output.outputs[0].text == expected
    assert whole.output.outputs[0].text == expected
    assert sum(map(bool, parts)) > 5


def test_an_abort_ends_the_text_where_it_is():
    ids = pieces("Hello world")
    for streaming in (True, False):
        text = collect(SamplingParams(n=2, temperature=1.0), ids, streaming)
        for token in ids:
            take(text, 1, [token])
        take(text, 1, finish_reason=FinishReason.ABORT, stop_reason="timeout")
        assert not text.output.finished
        first, second = text.output.outputs
        assert (first.text, first.finish_reason) == ("", None)
        assert (second.text, second.finish_reason, second.stop_reason) == (
            "Hello world", "abort", "timeout"
        )  # fmt: skip
        assert take(text, 1, ids[:1]) == ("", [])  # too late: ignored
        assert second.token_ids == ids


def test_what_was_held_back_is_given_at_the_end():
    hello, rocket = pieces("Hello wor"), pieces("\N{ROCKET}")[:-1]
    for sampling, ids, expected in (
        (SamplingParams(), hello + rocket, "Hello wor\ufffd"),
        (SamplingParams(stop="world"), hello, "Hello wor"),
    ):
        text = collect(sampling, pieces("x"), streaming=True)
        shown = "".join(take(text, 0, [token])[0] for token in ids)
        assert shown != expected and expected.startswith(shown)
        rest, stopped = take(text, finish_reason=FinishReason.ABORT)
        assert (shown + rest, stopped) == (expected, [])
        assert text.output.outputs[0].text == expected


def test_tokens_behind_a_stop_string_are_not_of_the_output():
    """Several tokens may come at once, and one before the last may end the text."""
    ids = pieces("The capital is Paris. And")
    sampling = SamplingParams(stop=["Paris"], logprobs=0)
    one, many = (collect(sampling, pieces("x"), streaming=True) for _ in range(2))
    text, number = "", 0
    while one.output.outputs[0].finish_reason is None:
        new, stopped = take(one, 0, [ids[number]], logprobs=[entry(ids[number])])
        text, number = text + new, number + 1
    assert stopped == [0] and number < len(ids)
    entries = [entry(token) for token in ids]
    assert take(many, 0, ids, logprobs=entries, finish_reason=FinishReason.LENGTH) == (text, [])
    assert one.output.outputs == many.output.outputs
    assert one.output.outputs[0].token_ids == ids[:number] and text == "The capital is "
