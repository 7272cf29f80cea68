"""Log-probabilities in the shapes of the two APIs."""

from collections.abc import Sequence

from engine.outputs import Logprob, PositionLogprobs
from engine.tokenizer import Tokenizer
from router.shapes import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

LEAST = -9999.0  # JSON has no infinity; OpenAI's servers and vLLM show this


def likeliest(position: PositionLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """The ``count`` likeliest tokens of a position (-1: all), which may lack the chosen one."""
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return ranked if count == -1 else ranked[:count]


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    count: int,
    tokenizer: Tokenizer,
    as_ids: bool,
    offsets: list[int],
) -> CompletionLogprobs:
    """OpenAI's lists for some tokens, whose text begins at ``offsets``. The top ones of a position
    are the chosen token and the ``count`` likeliest."""
    shown = CompletionLogprobs(offsets, [], [], [])
    for token_id, position in zip(token_ids, positions, strict=True):
        if position is None:  # a prompt's first token
            token = f"token_id:{token_id}" if as_ids else tokenizer.decode([token_id])
            logprob, top = None, None
        else:
            token = _name(token_id, position[token_id], as_ids)
            logprob = max(position[token_id].logprob, LEAST)
            top = {token: logprob}
            for other, entry in likeliest(position, count):
                top.setdefault(_name(other, entry, as_ids), max(entry.logprob, LEAST))
        shown.token_logprobs.append(logprob)
        shown.tokens.append(token)
        shown.top_logprobs.append(top)
    return shown


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs],
    count: int,
    tokenizer: Tokenizer,
    as_ids: bool,
) -> ChatLogprobs:
    """OpenAI's entries for some tokens, each with the ``count`` likeliest."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = [
            TopLogprob(*_token(other, entry, tokenizer, as_ids))
            for other, entry in likeliest(position, count)
        ]
        chosen = _token(token_id, position[token_id], tokenizer, as_ids)
        content.append(TokenLogprob(*chosen, top_logprobs=top))
    return ChatLogprobs(content)


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> PromptLogprobs | None:
    """vLLM's maps from token id, for each token of a prompt; None for the first, and for all if
    nobody asked for them."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            token_id: PromptLogprob(max(entry.logprob, LEAST), entry.rank, entry.decoded_token)
            for token_id, entry in position.items()
        }
        for position in positions
    ]


def _name(token_id: int, entry: Logprob, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else entry.decoded_token or ""


def _token(
    token_id: int, entry: Logprob, tokenizer: Tokenizer, as_ids: bool
) -> tuple[str, float, list[int]]:
    data = tokenizer.token_texts([token_id])[0].bytes
    return _name(token_id, entry, as_ids), max(entry.logprob, LEAST), list(data)
