"""Whether a request leaves itself a token to choose."""

from collections.abc import Sequence

from engine.errors import RequestError
from engine.sampling_params import SamplingParams


def check_choice(
    sampling: SamplingParams,
    bad_words: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    vocab_size: int,
) -> None:
    """Raises RequestError, naming the fields, where these leave no token to choose.

    bad_words: as token ids. stop_ids: what ends the output, which ``min_tokens`` puts off. Words of
    several tokens depend on what was chosen before; they are looked at where there is no choice.
    """
    allowed = sampling.allowed_token_ids
    banned = {word[0] for word in bad_words if len(word) == 1}
    stops = set(stop_ids) if sampling.min_tokens else set()
    if allowed is None:
        if len(banned) < vocab_size - len(stops):
            return  # the usual case, without a look at the vocabulary
        allowed = range(vocab_size)
    left = set(allowed) - banned
    of = "of allowed_token_ids" if sampling.allowed_token_ids is not None else "of the vocabulary"
    if not left:
        raise RequestError(f"bad_words ban every token {of}: none could be chosen")
    if left <= stops:
        raise RequestError(
            f"min_tokens ({sampling.min_tokens}) puts off every token {of} that bad_words do not"
            " ban, for each would end the output: none could be chosen"
        )
    if len(left) == 1 and not left & set(stop_ids):
        (only,) = left
        runs = [len(word) for word in bad_words if set(word) == {only}]
        if runs and (sampling.max_tokens is None or sampling.max_tokens >= min(runs)):
            raise RequestError(
                f"bad_words ban the only token {of} that could be chosen from the"
                f" {min(runs)}. token on; max_tokens must be less"
            )
