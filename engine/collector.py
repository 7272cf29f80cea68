"""From outcomes to what a user gets: text, stop strings, logprobs. It runs at the edges.

One ``Collector`` collects one request. It decides nothing but this: a completion whose text
reached a stop string is finished, and the engine must be told.
"""

from collections.abc import Callable, Sequence

from engine.continuation import Continuation
from engine.outcome import Outcome
from engine.outputs import (
    CompletionOutput,
    Logprob,
    Piece,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from engine.plan import TokenLogprobs
from engine.sequence import FinishReason
from engine.text import OutputText
from engine.tokenizer import Tokenizer


class Collector:
    """Collects the outcomes of one request into its ``RequestOutput``.

    ``output.text`` of a completion is set when it is finished. ``streaming`` says that pieces shall
    have their text at once; without it, and without stop strings to look for, text is made in one
    go at the end, at a fraction of the cost.
    """

    def __init__(
        self,
        request: Continuation,
        prompt: str | None,
        tokenizer: Tokenizer,
        metrics: RequestMetrics,
        streaming: bool = False,
    ) -> None:
        sampling = request.sampling
        ids = list(request.prompt_token_ids)
        self._tokenizer = tokenizer
        self._at_once = streaming or bool(sampling.stop)
        self._texts = [OutputText(tokenizer, ids, sampling) for _ in range(sampling.n)]
        outputs = [CompletionOutput(index) for index in range(sampling.n)]
        if sampling.logprobs is not None:
            for output in outputs:
                output.logprobs, output.cumulative_logprob = [], 0.0
        self.output = RequestOutput(request.request_id, prompt, ids, outputs, metrics)
        if sampling.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None] * len(ids)

    def take(self, outcomes: Sequence[Outcome], stop: Callable[[int], None]) -> list[Piece]:
        """Take in what came: a piece for each outcome of a completion that had not ended.

        ``stop`` is called with the index of a completion whose text has just reached a stop string,
        for its engine to end it.
        """
        pieces = []
        for outcome in outcomes:
            piece = self._take(outcome)
            if piece is not None:
                pieces.append(piece)
                if isinstance(piece.stop_reason, str) and outcome.finish_reason is None:
                    stop(piece.index)
        return pieces

    def _take(self, outcome: Outcome) -> Piece | None:
        output, text = self.output.outputs[outcome.index], self._texts[outcome.index]
        if output.finish_reason is not None:
            return None  # it was on its way when a stop string ended the completion
        for first, entries in outcome.prompt_logprobs or ():
            self._take_prompt(first, entries)
        tokens, reason = outcome.tokens, outcome.finish_reason
        start = len(output.token_ids)
        output.token_ids += tokens
        shown = tokens if self._at_once else output.token_ids if reason is not None else []
        new, stopped, used = text.push(shown, bool(tokens) and reason == FinishReason.STOP)
        if stopped is not None:
            del output.token_ids[start + used :]
            output.finish_reason, output.stop_reason = FinishReason.STOP.value, stopped
        elif reason is not None:
            new += text.finish()
            output.finish_reason, output.stop_reason = reason.value, outcome.stop_reason
        if outcome.vector is not None:
            self.output.vector = outcome.vector
        if outcome.logprobs is not None:
            self._take_logprobs(output, start, outcome.logprobs)
        if output.finish_reason is not None:
            output.text = text.text
        return Piece(
            output.index, new, output.token_ids[start:], output.finish_reason, output.stop_reason
        )

    def _take_logprobs(
        self, output: CompletionOutput, start: int, entries: list[TokenLogprobs]
    ) -> None:
        """Those of the tokens from ``start`` on, whose end a stop string may have cut off."""
        assert output.logprobs is not None and output.cumulative_logprob is not None
        for at, entry in zip(range(start, len(output.token_ids)), entries, strict=False):
            context = self.output.prompt_token_ids[-8:] + output.token_ids[max(0, at - 8) : at]
            output.logprobs.append(self._position(entry, context))
            output.cumulative_logprob += float(entry.logprobs[0])

    def _take_prompt(self, first: int, entries: list[TokenLogprobs]) -> None:
        logprobs, ids = self.output.prompt_logprobs, self.output.prompt_token_ids
        assert logprobs is not None
        for position, entry in enumerate(entries, first):
            logprobs[position] = self._position(entry, ids[max(0, position - 8) : position])

    def _position(self, entry: TokenLogprobs, context: list[int]) -> PositionLogprobs:
        """The entry by token id; an id that comes twice (chosen and among the top) is one."""
        ids = entry.ids.tolist()
        texts = self._tokenizer.token_texts(ids, context)
        values, ranks = entry.logprobs.tolist(), entry.ranks.tolist()
        return {
            token: Logprob(value, rank, text.text)
            for token, value, rank, text in zip(ids, values, ranks, texts, strict=True)
        }
