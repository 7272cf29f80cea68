"""What a caller asks of the engine, in tokens: text was made tokens before, at the edge."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    """``n`` completions of one prompt.

    bad_words: the token id sequences of ``sampling.bad_words``, which the tokenizer made.
    priority: lower runs first, under the policy of that name.
    client: who asks, for the policy ``fair``.
    timeout: seconds from its arrival after which it is aborted; None is never.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    bad_words: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    client: str = ""
    timeout: float | None = None
