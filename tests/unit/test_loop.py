"""The engine's thread and its clients, on the simulated executor."""

import asyncio
import random
import time

import pytest

from cluster.loop import LocalClient
from cluster.messages import Drain, EndRequests
from cluster.streams import Stream
from engine.config import FailoverConfig
from engine.errors import EngineError, PromptTooLong, QueueFull, RequestError
from tests.support.gated import INFO, make_loop
from tests.support.simulator import VOCAB, foretell
from tests.support.streams import Route, request, submit, tokens_of


def run(scenario, **options):
    """Run an async scenario on a loop; at its end nothing must be left."""
    loop, executor = make_loop(**options)

    async def main():
        loop.start()
        client = LocalClient(loop, INFO)
        try:
            await asyncio.wait_for(scenario(client, loop, executor), 60)
        finally:
            executor.gate.set()
            await client.close()

    asyncio.run(main())
    assert executor.stopped
    return loop, executor


def assert_free(loop):
    kv = loop.engine.scheduler.kv
    assert kv.device.num_held == 0 and kv.cpu.num_held == 0
    kv.device.check()


async def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.002)


def test_many_streams_get_their_own_tokens_under_pressure():
    rng = random.Random(0)

    async def scenario(client, loop, executor):
        async def one(i):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
            await asyncio.sleep(rng.random() * 0.1)
            stream = await submit(client, request(f"r{i}", prompt, 20, seed=i))
            tokens, reason = await tokens_of(stream)
            assert tokens == foretell(prompt, i, 20) and reason == "length"
            metrics = stream.metrics
            assert metrics.arrival_time <= metrics.first_scheduled_time
            assert metrics.first_scheduled_time <= metrics.first_token_time
            assert metrics.first_token_time <= metrics.finished_time

        await asyncio.gather(*(one(i) for i in range(40)))
        assert_free(loop)

    loop, _ = run(scenario, num_blocks=32)
    assert loop.engine.scheduler.stats.preemptions_swap > 0


def test_requests_are_ended_with_an_error_and_the_engine_goes_on():
    """What a shutdown does to those that are not done in time."""

    async def scenario(client, loop, executor):
        other = LocalClient(loop, INFO)
        streams = [await submit(c, request(f"r{i}", max_tokens=100, seed=i))
                   for i, c in enumerate((client, other, other))]  # fmt: skip
        await anext(streams[0])
        loop.post(lambda: loop.take(client, Drain()))
        loop.post(lambda: loop.take(client, EndRequests("it is over")))
        for stream in streams:
            with pytest.raises(EngineError, match="it is over"):
                await tokens_of(stream)
        await until(lambda: not loop.engine.has_work)
        assert_free(loop)
        assert loop.alive and loop.wait_idle(1)
        late = LocalClient(loop, INFO)
        with pytest.raises(EngineError, match="the engine is draining"):
            await submit(late, request("late"))

    run(scenario)


def test_an_admission_error_comes_to_its_submitter_only():
    async def scenario(client, loop, executor):
        good = await submit(client, request("good", max_tokens=20))
        with pytest.raises(PromptTooLong, match="max_model_len"):
            await submit(client, request("long", range(1, 200)))
        with pytest.raises(RequestError, match="running already"):
            await submit(client, request("good"))
        tokens, _ = await tokens_of(good)
        assert tokens == foretell([1, 2, 3], 0, 20)

    run(scenario)


def test_a_full_queue_is_said():
    async def scenario(client, loop, executor):
        executor.gate.clear()
        sent = [asyncio.create_task(submit(client, request(f"r{i}"))) for i in range(3)]
        await asyncio.sleep(0.05)
        executor.gate.set()
        done = await asyncio.gather(*sent, return_exceptions=True)
        refused = [e for e in done if isinstance(e, QueueFull)]
        assert refused and len(refused) < 3
        for stream in done:
            if not isinstance(stream, QueueFull):
                await tokens_of(stream)

    run(scenario, max_num_seqs=1, max_queued_requests=1)


def test_cancel_frees_the_blocks_in_any_state():
    async def scenario(client, loop, executor):
        scheduler = loop.engine.scheduler
        streams = [await submit(client, request(f"r{i}", [i] * 20, 100)) for i in range(6)]
        await until(lambda: scheduler.stats.preemptions_swap and scheduler.num_waiting)
        for stream in streams:
            stream.cancel()
        for stream in streams:
            _, reason = await tokens_of(stream)
            assert reason == "abort"
        await until(lambda: not loop.engine.has_work)
        assert_free(loop)

    run(scenario, num_blocks=32, max_num_seqs=4, preemption_mode="swap")


def test_a_submit_that_is_given_up_leaves_nothing():
    async def scenario(client, loop, executor):
        executor.gate.clear()
        first = await submit(client, request("first", max_tokens=4))
        await until(lambda: loop.step_seconds > 0)
        task = asyncio.create_task(submit(client, request("second", max_tokens=100)))
        await asyncio.sleep(0.02)
        task.cancel()
        executor.gate.set()
        await tokens_of(first)
        await until(lambda: not loop.engine.has_work)
        assert_free(loop)

    run(scenario)


def test_stop_at_text_ends_one_completion():
    async def scenario(client, loop, executor):
        stream = await submit(client, request("r", max_tokens=100, n=2, temperature=1.0))
        seen = {0: 0, 1: 0}
        async for outcomes in stream:
            for outcome in outcomes:
                seen[outcome.index] += len(outcome.tokens)
                if outcome.index == 1 and 0 < seen[1] <= 3:
                    stream.stop_at_text(1)
        assert seen[0] == 100 and 1 <= seen[1] < 10

    run(scenario)


def test_tokens_of_a_completion_that_was_stopped_are_nobodys():
    """They may be on their way, however many; the others of its request go on."""

    async def scenario(client, loop, executor):
        stream = await submit(client, request("r", max_tokens=100, n=2, temperature=1.0))
        attempt = stream._attempt
        await anext(stream)
        stream.stop_at_text(1)
        for position in range(1, 40, 3):
            stream.put_token(attempt, 1, position, 7)
        tokens, reason = await tokens_of(stream)
        assert 90 < len(tokens) < 101 and reason == "length" and stream._moves == 0

    run(scenario)


def test_a_gap_between_tokens_has_the_request_run_again_elsewhere():
    async def scenario(client, loop, executor):
        other, other_executor = make_loop()
        other.start()
        clients = client, LocalClient(other, INFO)
        try:
            made = request("r", max_tokens=100)
            stream = await Stream(made, Route(*clients), FailoverConfig()).start()
            (first,) = await anext(stream)
            taken = len(first.tokens)
            stream.put_token(stream._attempt, 0, 99, 7)
            tokens, reason = await tokens_of(stream)
            assert first.tokens + tokens == foretell([1, 2, 3], 0, 100) and taken < 100
            assert stream._moves == 1 and reason == "length"
        finally:
            await asyncio.to_thread(other.stop)

    run(scenario)


def test_a_failing_step_reaches_every_stream_with_its_cause():
    async def scenario(client, loop, executor):
        streams = [await submit(client, request(f"r{i}", max_tokens=100)) for i in range(4)]
        readers = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        await until(lambda: executor.ran > 5)
        executor.error = OSError("the disk is on fire")
        for reader in readers:
            with pytest.raises(EngineError, match="OSError: the disk is on fire"):
                await reader
        assert not client.healthy
        with pytest.raises(EngineError, match="the disk is on fire"):
            await submit(client, request("late"))

    run(scenario, max_failovers=0)


def test_a_worker_that_dies_while_all_is_idle_is_noticed():
    async def scenario(client, loop, executor):
        await tokens_of(await submit(client, request("r", max_tokens=2)))
        executor.dead = "worker 1 was killed"
        await until(lambda: not client.healthy)
        with pytest.raises(EngineError, match="worker 1 was killed"):
            await submit(client, request("late"))

    run(scenario, max_failovers=0)


def test_stopping_the_loop_ends_the_streams():
    async def scenario(client, loop, executor):
        stream = await submit(client, request("r", max_tokens=100))
        await asyncio.to_thread(loop.stop)
        with pytest.raises(EngineError, match="the engine was stopped"):
            await tokens_of(stream)

    run(scenario)


def test_a_draining_engine_finishes_what_runs_and_takes_nothing_new():
    async def scenario(client, loop, executor):
        stream = await submit(client, request("r", max_tokens=50))
        loop.drain()
        await until(lambda: client.load.draining)
        with pytest.raises(EngineError, match="draining"):
            await submit(client, request("late"))
        tokens, _ = await tokens_of(stream)
        assert len(tokens) == 50
        assert await asyncio.to_thread(loop.wait_idle, 10)

    run(scenario)


def test_an_idle_loop_sleeps_and_wakes():
    async def scenario(client, loop, executor):
        await tokens_of(await submit(client, request("r", max_tokens=2)))
        polls = []
        wait = loop._wake.wait
        loop._wake.wait = lambda timeout: (polls.append(timeout), wait(timeout))[1]
        await asyncio.sleep(1.2)
        assert 1 <= len(polls) <= 6 and all(timeout > 0 for timeout in polls)
        await tokens_of(await submit(client, request("again", max_tokens=2)))

    run(scenario)


def test_clients_know_at_once_that_the_engine_is_free_again(monkeypatch):
    monkeypatch.setattr("cluster.loop.LOAD_AT_LEAST", 1000.0)

    async def scenario(client, loop, executor):
        for i in range(3):
            stream = await submit(client, request(f"r{i}", [i] * 20, 100))
            await until(lambda: client.load.running)
            stream.cancel()
            await until(lambda: not client.load.running)
            assert client.load.free_blocks == 64

    run(scenario)
