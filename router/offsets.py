"""Where the tokens of a choice begin in its text: the ``text_offset`` of OpenAI's completions."""

from collections.abc import Sequence

from engine.sampling_params import SamplingParams
from engine.text import detokenizer
from engine.tokenizer import Tokenizer


class TextOffsets:
    """Offsets in characters of the text that a choice shows, whatever its tokens are called.

    A token without text there (a special token that is left out, a part of a character, what a
    stop string cut off) has the offset at which its text would be.

    prompt_ids: what the output follows.
    """

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._text = detokenizer(
            tokenizer,
            prompt_ids,
            sampling.skip_special_tokens,
            sampling.spaces_between_special_tokens,
        )
        self._at = 0

    def of_prompt(self, ids: Sequence[int], text: str) -> list[int]:
        """The offsets of a prompt that is echoed as ``text``; the output follows it.

        A text as it was sent may lack what the tokenizer puts before it (a begin token, a space)
        or write a character otherwise: each token is looked for from where the last one ended.
        """
        offsets = []
        pieces = detokenizer(self._tokenizer, (), skip_special_tokens=False)
        added = self._tokenizer.backend.added_ids  # begin tokens and the like
        at = 0
        for token_id in ids:
            piece = pieces.push((token_id,))
            begin, size = _find(text, piece, at)
            if size < 0:
                size = 0 if token_id in added else len(piece)
            offsets.append(begin)
            at = min(begin + size, len(text))
        self._at = len(text)
        return offsets

    def of_output(self, ids: Sequence[int], end: int | None) -> list[int]:
        """The offsets of the output's next tokens. end: the length of the text, if it is known."""
        offsets = []
        for token_id in ids:
            offsets.append(self._at if end is None else min(self._at, end))
            self._at += len(self._text.push((token_id,)))
        return offsets


def _find(text: str, piece: str, at: int) -> tuple[int, int]:
    """Where ``piece`` begins in ``text``, at ``at`` or a few characters on, and its length there;
    (``at``, -1) if it is not there."""
    for form in (piece, piece.lstrip()):
        if text.startswith(form, at):
            return at, len(form)
    nearby = text.find(piece, at, at + len(piece) + 8)
    return (at, -1) if nearby < 0 else (nearby, len(piece))
