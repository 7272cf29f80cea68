"""From token deltas to what a user gets: text, stop strings, logprobs. It runs at the edges.

One ``RequestText`` collects one request. It decides nothing but this: a completion whose text
reached a stop string is finished, and the engine must be told.
"""

from engine.engine import Delta
from engine.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from engine.plan import TokenLogprobs
from engine.request import Request
from engine.sequence import FinishReason
from engine.text import OutputText
from engine.tokenizer import Tokenizer


class RequestText:
    """Collects the deltas of one request into its ``RequestOutput``.

    ``output.text`` of a completion is set when it is finished. ``streaming`` says that ``take``
    shall give the text of each delta at once; without it, and without stop strings to look for,
    text is made in one go at the end, at a fraction of the cost.
    """

    def __init__(
        self,
        request: Request,
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

    def take(self, delta: Delta) -> tuple[str, str | None]:
        """Take in a delta: the new text, and the stop string that the text has just reached.

        If there is one, the caller ends the completion in the engine. Deltas after that are
        ignored.
        """
        output = self.output.outputs[delta.index]
        if output.finish_reason is not None:
            return "", None
        if delta.prompt_logprobs is not None:
            self._take_prompt(*delta.prompt_logprobs)
        text = self._texts[delta.index]
        new, stopped = "", None
        if delta.token is not None:
            output.token_ids.append(delta.token)
            if delta.logprobs is not None:
                self._take_logprobs(output, delta.logprobs)
            ended = delta.finish_reason == FinishReason.STOP
            if self._at_once:
                new, stopped, _ = text.push([delta.token], ended_by_stop_token=ended)
            elif delta.finish_reason is not None:
                new, _, _ = text.push(output.token_ids, ended_by_stop_token=ended)
        elif delta.finish_reason is not None and not self._at_once:
            new, _, _ = text.push(output.token_ids)
        if stopped is not None:
            output.finish_reason, output.stop_reason = FinishReason.STOP.value, stopped
        elif delta.finish_reason is not None:
            new += text.finish()
            output.finish_reason = delta.finish_reason.value
            output.stop_reason = delta.stop_reason
        if output.finish_reason is not None:
            output.text = text.text
        return new, stopped

    def _take_logprobs(self, output: CompletionOutput, entry: TokenLogprobs) -> None:
        assert output.logprobs is not None and output.cumulative_logprob is not None
        context = self.output.prompt_token_ids[-8:] + output.token_ids[-9:-1]
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
