"""Requests whose engine dies, hangs, fails or leaves: they go on elsewhere, with the same tokens.

The engines are processes of their own, with the simulated executor, whose tokens can be foretold.
"""

import asyncio
import random
import signal
from dataclasses import replace

import pytest

from cluster import transport
from cluster.streams import Stream
from cluster.transport import RemoteClient
from engine.config import FailoverConfig
from engine.continuation import begin, child_seed
from engine.errors import EngineError
from engine.sampling_params import SamplingParams
from tests.support.simulated_engine import EngineProcess
from tests.support.simulator import VOCAB, foretell
from tests.support.streams import Route, tokens_of


def requests(count, rng, **sampling):
    """So many requests: (request, its completions' tokens)."""
    found = []
    for i in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 300))]
        n, most = rng.choice([1, 1, 1, 3]), rng.randint(1, 600)
        params = SamplingParams(max_tokens=most, temperature=1, n=n, **sampling)
        request = begin(f"r{i}", prompt, params)
        expected = [foretell(prompt, child_seed(request.seed, j), most) for j in range(n)]
        found.append((request, expected))
    return found


async def finished(stream, n):
    """The tokens of each completion; every outcome follows on the one before."""
    tokens, reasons = [[] for _ in range(n)], [None] * n
    async for outcomes in stream:
        for outcome in outcomes:
            assert outcome.position == len(tokens[outcome.index]) and not reasons[outcome.index]
            tokens[outcome.index] += outcome.tokens
            reasons[outcome.index] = outcome.finish_reason
    assert set(reasons) == {"length"}
    return tokens


@pytest.mark.parametrize("kind", ["kill", "stop", "hang", "fail", "drain"])
def test_what_an_engine_had_goes_on_at_another(kind, monkeypatch):
    """Running, swapped out, queued and in prefill; some have ended."""
    few = {"num_blocks": 1400, "num_cpu_blocks": 2000, "max_num_seqs": 12}
    with EngineProcess(**few) as one, EngineProcess(**few) as other:
        one.ask("step 0.01")  # it still has most of them when we have seen four end

        async def main():
            clients = [await RemoteClient.open(engine.address) for engine in (one, other)]
            route = Route(*clients)
            made = requests(40, random.Random(kind))
            streams = [await Stream(r, route, FailoverConfig()).start() for r, _ in made]
            readers = [
                asyncio.create_task(finished(stream, len(expected)))
                for stream, (_, expected) in zip(streams, made, strict=True)
            ]
            while sum(reader.done() for reader in readers) < 4:
                await asyncio.sleep(0.01)
            # Only now do we lose patience: a busy machine may have kept the engine waiting before.
            if kind == "drain":
                clients[0].drain()
            elif kind == "kill":
                one.process.kill()
            elif kind == "stop":
                monkeypatch.setattr(transport, "SILENCE", 3.0)
                one.process.send_signal(signal.SIGSTOP)
            elif kind == "hang":
                clients[0].info = replace(clients[0].info, step_timeout=1.5)
                one.ask("hang")
            else:
                one.ask("fail no more ink")
            assert await asyncio.gather(*readers) == [expected for _, expected in made]
            assert len(route.moves) > 20
            assert {cause for cause, _ in route.moves} == {"drained" if kind == "drain" else "lost"}
            assert all(s.metrics.finished_time >= s.metrics.first_token_time for s in streams)
            if kind == "drain":  # it is idle, though its requests are not over
                state = await asyncio.to_thread(one.ask)
                assert not state["unfinished"] and not state["device"]
            for client in clients:
                await client.close()

        asyncio.run(main())
        while other.ask()["unfinished"]:
            pass
        state = other.ask()
        assert not (state["device"] or state["cpu"])


def test_requests_wait_for_the_engine_that_takes_their_engines_place():
    """With signs of life for whoever reads, and an end if none comes."""

    async def scenario():
        made = requests(10, random.Random(0))
        with EngineProcess() as first:
            route = Route(await RemoteClient.open(first.address))
            streams = [await Stream(r, route, FailoverConfig()).start() for r, _ in made]
            late = begin("late", [1], SamplingParams(max_tokens=4000))
            policy = FailoverConfig(failover_timeout=0.5)
            hopeless = await Stream(late, route, policy).start()
            readers = [
                asyncio.create_task(finished(stream, len(expected)))
                for stream, (_, expected) in zip(streams[1:], made[1:], strict=True)
            ]
            await anext(streams[0])
            first.process.kill()
        signs = 0
        with pytest.raises(EngineError, match="the engine simulated is gone"):
            await tokens_of(hopeless)
        while not await anext(streams[0]) and signs < 1:
            signs += 1
        with EngineProcess() as second:
            route.clients[:] = [await RemoteClient.open(second.address)]
            assert await asyncio.gather(*readers) == [expected for _, expected in made[1:]]
            streams[0].cancel()
            while second.ask()["unfinished"]:
                pass

    asyncio.run(scenario())


def test_a_deadline_is_kept_over_engines():
    async def scenario():
        params = SamplingParams(max_tokens=4000, ignore_eos=True)
        with EngineProcess() as first, EngineProcess() as second:
            clients = [await RemoteClient.open(engine.address) for engine in (first, second)]
            request = begin("r", [1, 2, 3], params, timeout=1.5)
            waits = begin("w", [1, 2, 3], params, timeout=1.0)
            streams = [
                await Stream(request, Route(*clients), FailoverConfig()).start(),
                await Stream(waits, Route(clients[0]), FailoverConfig()).start(),
            ]
            await anext(streams[0])
            first.process.kill()
            ends = []
            for stream in streams:
                async for outcomes in stream:
                    ends += [o.stop_reason for o in outcomes if o.finish_reason == "abort"]
                    begun = stream.metrics.arrival_time
                assert 0.9 < stream.metrics.finished_time - begun < 3
            assert ends == ["timeout", "timeout"]

    asyncio.run(scenario())


def test_a_request_that_ends_engines_ends_itself_and_no_other():
    """Engines die of it as soon as they run it; those beside it come to their ends."""

    async def scenario():
        made = requests(30, random.Random(1))
        # A token of no other request: one that moves brings what it has written along.
        taken = {
            t for r, expected in made for tokens in (r.prompt_token_ids, *expected) for t in tokens
        }
        poison = next(t for t in range(VOCAB) if t not in taken)
        engines = [EngineProcess(poison=poison) for _ in range(4)]
        try:
            route = Route(*[await RemoteClient.open(engine.address) for engine in engines])
            bad = begin("bad", [5, poison, 5], SamplingParams(max_tokens=50))
            streams = [
                await Stream(request, route, FailoverConfig()).start()
                for request in [*(r for r, _ in made[:15]), bad, *(r for r, _ in made[15:])]
            ]
            readers = [
                asyncio.create_task(finished(stream, len(expected)))
                for stream, (_, expected) in zip(streams[:15] + streams[16:], made, strict=True)
            ]
            ends = []
            async for outcomes in streams[15]:
                ends += outcomes
            (end,) = ends
            assert end.finish_reason == "error" and "request bad was running" in end.stop_reason
            assert "3 times in a row" in end.stop_reason
            assert await asyncio.gather(*readers) == [expected for _, expected in made]
            assert [engine.process.poll() is None for engine in engines] == [False] * 3 + [True]
        finally:
            for engine in engines:
                engine.__exit__()

    asyncio.run(scenario())
