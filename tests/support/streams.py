"""Requests to an engine in tokens, and what their streams bring."""

import asyncio
import time

from cluster.streams import Stream
from engine.config import FailoverConfig
from engine.continuation import begin
from engine.errors import EngineError
from engine.sampling_params import SamplingParams


def request(name, prompt=(1, 2, 3), max_tokens=8, **options):
    sampling = SamplingParams(**{"temperature": 0, "seed": 0, "max_tokens": max_tokens, **options})
    return begin(request_id=name, prompt_token_ids=list(prompt), sampling=sampling)


class Route:
    """To the first of some engines that takes a request; what moved is noted."""

    def __init__(self, *clients):
        self.clients = list(clients)
        self.moves = []

    async def ready(self, seconds):
        deadline = time.monotonic() + seconds
        while not any(client.healthy and client.load.admits for client in self.clients):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def admit(self, request, sink, leaving=False):
        error = EngineError("no engine takes it")
        for client in self.clients:
            if client.healthy and (client.load.admits or not leaving):
                try:
                    return await client.submit(request, sink)
                except EngineError as failure:  # it died meanwhile
                    error = failure
        raise error

    def moved(self, cause, seconds):
        self.moves.append((cause, seconds))


async def submit(client, request):
    """The stream of a request that has one engine, and ends with it."""
    if not client.healthy:
        await client.submit(request, None)  # raises the cause
    return await Stream(request, Route(client), FailoverConfig(max_failovers=0)).start()


async def tokens_of(stream):
    """Every token of a stream, and why it ended."""
    tokens, reason = [], None
    async for outcomes in stream:
        for outcome in outcomes:
            tokens += outcome.tokens
            reason = outcome.finish_reason or reason
    return tokens, reason
