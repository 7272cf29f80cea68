"""Requests to an engine in tokens, and what their streams bring."""

from engine.request import Request
from engine.sampling_params import SamplingParams


def request(name, prompt=(1, 2, 3), max_tokens=8, **options):
    sampling = SamplingParams(**{"temperature": 0, "seed": 0, "max_tokens": max_tokens, **options})
    return Request(request_id=name, prompt_token_ids=list(prompt), sampling=sampling)


async def tokens_of(stream):
    """Every token of a stream, and why it ended."""
    tokens, reason = [], None
    async for deltas in stream:
        for delta in deltas:
            if delta.token is not None:
                tokens.append(delta.token)
            reason = delta.finish_reason or reason
    return tokens, reason
