"""Which tokens the text for the user came of, and their log-probabilities."""

from collections.abc import Iterator, Sequence

from engine.outputs import CompletionOutput, Piece
from engine.parsing.parser import Parser
from engine.parsing.parts import Content, Part, Reasoning
from engine.parsing.source import NO_TAGS, Tags
from engine.sampling_params import SamplingParams
from engine.text import detokenizer
from engine.tokenizer import Tokenizer
from router.logprobs import chat_logprobs
from router.shapes import TokenLogprob


class SpelledParts:
    """The parts of an answer, made token by token, so that however it comes each part has the same
    tokens. For an answer that no stop string ends.

    parser: None if all is text for the user. hidden: see ``Parser``. prompt_ids: what the answer
    follows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt_ids: Sequence[int],
        parser: Parser | None,
        hidden: Tags = NO_TAGS,
    ) -> None:
        assert sampling.logprobs is not None and not sampling.stop
        self._tokenizer, self._top, self._parser = tokenizer, sampling.logprobs, parser
        self._hidden = hidden
        self._text = detokenizer(
            tokenizer,
            prompt_ids,
            sampling.skip_special_tokens,
            sampling.spaces_between_special_tokens,
        )
        self._count = 0  # of the tokens so far
        # The text that no part has yet, by token; None stands for what was told of it already.
        self._left: list[tuple[str, TokenLogprob | None]] = []

    def read(
        self, output: CompletionOutput, piece: Piece
    ) -> Iterator[tuple[Part, list[TokenLogprob]]]:
        """The parts of the next piece of ``output``; of text for the user with its tokens."""
        ids = piece.token_ids
        assert output.logprobs is not None
        positions = output.logprobs[self._count : self._count + len(ids)]
        self._count += len(ids)
        entries = chat_logprobs(ids, positions, self._top, self._tokenizer, as_ids=False).content
        if piece.finish_reason == "stop":
            ids = ids[:-1]  # but for the token that ends it, which has no text
        for token, entry in zip(ids, entries, strict=False):
            text = self._text.push((token,))
            shown = self._hidden.without(text)
            if shown or token not in self._tokenizer.backend.added_ids:
                self._left.append((shown, entry))
            yield from self._told(self._pushed(text))
        if piece.finish_reason is not None:
            text = self._text.finish()
            self._left.append((text, None))
            parts = self._pushed(text)
            if self._parser is not None:
                parts += self._parser.finish(cut=piece.finish_reason != "stop")
            yield from self._told(parts)

    def _pushed(self, text: str) -> list[Part]:
        if self._parser is not None:
            return self._parser.push(text)
        return [Content(text)] if text else []

    def _told(self, parts: list[Part]) -> Iterator[tuple[Part, list[TokenLogprob]]]:
        for part in parts:
            entries: list[TokenLogprob] = []
            if isinstance(part, Content | Reasoning):
                entries = self._entries_of(part.text)
            else:
                self._left.clear()
            yield part, entries if isinstance(part, Content) else []

    def _entries_of(self, text: str) -> list[TokenLogprob]:
        """Those of the tokens that ``text`` came of and that were not told of. It stands as near
        the end as it can: before it are marks, after it what is held back."""
        begin = "".join(piece for piece, _ in self._left).rfind(text)
        if begin < 0:
            return []
        end, at = begin + len(text), 0
        found, rest = [], []
        for piece, entry in self._left:
            start, at = at, at + len(piece)
            if start < end and (at > begin or start >= begin):
                if entry is not None:
                    found.append(entry)
                entry = None
            if at > end or start >= end:
                rest.append((piece[max(0, end - start) :], entry))
        self._left = rest
        return found
