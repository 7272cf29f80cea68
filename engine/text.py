"""One request's output as text: token ids in, text out as soon as it is certain.

Text once given is never changed. So half a character is held back, and, without
``include_stop_str_in_output``, an end that could begin a stop string.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from engine.sampling_params import SamplingParams
from engine.token_bytes import ByteDecoder
from engine.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """Makes text of one sequence's output. All that it returns, joined, is what the whole output
    decodes to after the tokens before it."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these further tokens make certain."""

    def finish(self) -> str:
        """The text of what was held back: U+FFFD for an unfinished character."""


class ByteDetokenizer:
    """By bytes, for the tokenizers that ``engine.token_bytes`` covers.

    Where SentencePiece's byte tokens are not UTF-8, each wrong byte is U+FFFD, as SentencePiece has
    it. (tokenizers also takes back the right characters beside it, which a stream has shown.)
    """

    def __init__(
        self, decoder: ByteDecoder, context_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._decoder = decoder
        self._bytes = decoder.shown if skip_special_tokens else decoder.all
        self._begun, at_start = decoder.unfinished(context_ids, self._bytes)
        self._strip = at_start and decoder.strips_first_space

    def push(self, ids: Sequence[int]) -> str:
        known = self._bytes
        return self._text(self._begun + b"".join([known[i] for i in ids]), final=False)

    def finish(self) -> str:
        return self._text(self._begun, final=True)

    def _text(self, data: bytes, final: bool) -> str:
        text, used = self._decoder.text(data, final)
        self._begun = data[used:]
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """By decoding a window of tokens with and without its newest and giving the difference, for
    decoders whose text of a token depends on its neighbours (the method of text-generation-
    inference, huggingface/text-generation-inference#242)."""

    def __init__(self, decode: Callable[[list[int]], str], context_ids: Sequence[int]) -> None:
        self._decode = decode
        size = 8
        # A window without text (special tokens) would look like the start of everything.
        while not decode(list(context_ids[-size:])) and size < len(context_ids):
            size *= 2
        self._move(list(context_ids[-size:]))

    def _move(self, window: list[int]) -> None:
        self._window = window
        self._read = len(window)
        self._shown = len(self._decode(window))  # characters of the window that are given already

    def push(self, ids: Sequence[int]) -> str:
        self._window.extend(ids)
        text = self._decode(self._window)
        if len(text) <= self._shown or text.endswith("\ufffd"):
            return ""
        new = text[self._shown :]
        self._move(self._window[self._read :])
        return new

    def finish(self) -> str:
        return self._decode(self._window)[self._shown :]


def detokenizer(
    tokenizer: Tokenizer,
    context_ids: Sequence[int],
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> Detokenizer:
    """A detokenizer for the output that follows ``context_ids``: the prompt, and output that was
    given elsewhere before."""
    if (decoder := tokenizer.backend.byte_decoder) is not None:
        return ByteDetokenizer(decoder, context_ids, skip_special_tokens)
    return WindowDetokenizer(
        lambda ids: tokenizer.decode(ids, skip_special_tokens, spaces_between_special_tokens),
        context_ids,
    )


class StopStrings:
    """Finds stop strings in a text that comes in pieces, at the earliest character.

    The stop string that is complete first wins; of those complete at once, the first of the list
    (as in vLLM). The text ends before it, or with it if ``include``.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._first = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops))
        self._tail = ""  # the longest end of the text that could begin a stop string

    def push(self, text: str, check: bool = True) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string, if one ends in ``text``.

        check: False, and a stop string that ends here does not count.
        """
        if not self._tail and self._first.isdisjoint(text):
            return text, None
        old = len(self._tail)
        text = self._tail + text
        end = len(text) + 1
        found = None
        if check:
            for stop in self._stops:
                at = text.find(stop, max(0, old - len(stop) + 1))
                if at >= 0 and at + len(stop) < end:
                    found, end = stop, at + len(stop)
        given = old if self._include else 0
        if found is not None:
            self._tail = ""
            return text[given : end if self._include else end - len(found)], found
        held = self._held_from(text)
        self._tail = text[held:]
        return text[given : len(text) if self._include else held], None

    def _held_from(self, text: str) -> int:
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first:
                end = text[at:]
                if any(len(s) > len(end) and s.startswith(end) for s in self._stops):
                    return at
        return len(text)

    def finish(self) -> str:
        """What was held back, when no stop string can follow any more."""
        held, self._tail = self._tail, ""
        return "" if self._include else held


class TextDelta(NamedTuple):
    """text: to append. stopped: the stop string that ended the output. consumed: how many of the
    pushed tokens belong to the output, less than all only if one before the last stopped it."""

    text: str
    stopped: str | None
    consumed: int


class OutputText:
    """The text of one output of a request, with its stop strings.

    tokenizer: may be None if ``params.detokenize`` is False; there is no text then.
    prompt_ids: what the output follows. To go on with an output that began elsewhere, push its
    tokens again: the same tokens give the same text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._detokenizer = None
        if params.detokenize:
            assert tokenizer is not None
            self._detokenizer = detokenizer(
                tokenizer,
                prompt_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
            )
        self._include = params.include_stop_str_in_output
        self._stops = StopStrings(params.stop, self._include) if params.stop else None
        self._unchecked = params.min_tokens  # tokens to come in which no stop string ends
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text given so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, ids: Sequence[int], ended_by_stop_token: bool = False) -> TextDelta:
        """The text that these further tokens make certain.

        ended_by_stop_token: the last of them is an end or stop token that ended the output: it has
        no text unless ``include_stop_str_in_output``.
        """
        if self._detokenizer is None:
            return TextDelta("", None, len(ids))
        shown = ids[:-1] if ended_by_stop_token and not self._include else ids
        if self._stops is None:
            text = self._detokenizer.push(shown)
            if text:
                self._parts.append(text)
            return TextDelta(text, None, len(ids))
        stopped = None
        consumed = 0
        before = len(self._parts)
        for token_id in shown:  # one by one, to know which one completes a stop string
            consumed += 1
            self._unchecked -= 1
            text = self._detokenizer.push((token_id,))
            if text:
                text, stopped = self._stops.push(text, check=self._unchecked < 0)
                self._parts.append(text)
                if stopped is not None:
                    break
        delta = "".join(self._parts[before:])
        return TextDelta(delta, stopped, len(ids) if stopped is None else consumed)

    def finish(self) -> str:
        """The text that was held back, when the output ends otherwise than by a stop string."""
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.finish()
        if self._stops is not None:
            text, _ = self._stops.push(text, check=False)
            text += self._stops.finish()
        self._parts.append(text)
        return text
