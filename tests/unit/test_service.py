"""Which engine a request reaches while engines hang, drain and are replaced; simulated engines."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.loop import LocalClient
from engine.chat import load_template
from engine.config import EMBEDDED_MODEL, FailoverConfig, ServedAs
from engine.continuation import begin
from engine.errors import EngineError, Unavailable
from engine.sampling_params import SamplingParams
from router.config import RouterConfig
from router.errors import ApiError, api_error
from router.generation import Prompt
from router.parsing import form_of
from router.service import Service
from router.tools import ToolUse
from tests.support.gated import INFO, make_loop
from tests.support.streams import submit
from workers.checkpoint import resolve

TOKENIZER = str(resolve(EMBEDDED_MODEL, None, "auto"))
BRIEF = FailoverConfig(failover_timeout=0.1)
GREEDY = SamplingParams(temperature=0, max_tokens=4)


def run(scenario, *engines):
    """Run a scenario with a client and the executor of each engine, of which ``engines`` gives
    what is not as in INFO."""

    async def main():
        made = [make_loop() for _ in engines]
        clients = []
        for facts, (loop, _) in zip(engines, made, strict=True):
            loop.start()
            clients.append(LocalClient(loop, replace(INFO, tokenizer=TOKENIZER, **facts)))
        try:
            await scenario(*clients, *(executor for _, executor in made))
        finally:
            for loop, executor in made:
                executor.gate.set()
                await asyncio.to_thread(loop.stop)

    asyncio.run(main())


async def engine_of(service, prompt=(1, 2, 3), name=None):
    """The id of the engine that a request reached."""
    model = await service.model(name)
    async with service.generations(model, [Prompt(list(prompt))], GREEDY, 0, False) as (one,):
        engine = one.stream._attempt.place.client.info.engine_id
        async for outcomes in one.stream:
            one.take(outcomes)
        return engine


async def drained(client):
    client._loop.drain(closing=True)
    while not client.load.draining:
        await asyncio.sleep(0.001)


def test_an_engine_that_drains_does_not_hide_one_that_has_come():
    async def scenario(old, new, *_):
        engines = [old]

        async def look():
            engines[:] = [old, new]

        service = Service(RouterConfig(), engines, look=look)
        assert await engine_of(service) == "old" and len(engines) == 1
        await drained(old)
        assert await engine_of(service) == "new"
        engines.remove(new)
        await drained(new)
        with pytest.raises(Unavailable, match="shutting down"):
            await engine_of(service)

    run(scenario, {"engine_id": "old"}, {"engine_id": "new"})


def test_a_request_that_comes_while_an_engine_leaves_waits_for_the_next():
    async def scenario(old, new, *_):
        service = Service(RouterConfig(), engines := [old])
        await service.model()
        old._loop.drain()
        while not old.load.draining:
            await asyncio.sleep(0.001)
        asked = asyncio.create_task(engine_of(service))
        await asyncio.sleep(0.3)
        assert not asked.done()
        engines.append(new)
        assert await asked == "new"

    run(scenario, {"engine_id": "old"}, {"engine_id": "new"})


def test_a_request_does_not_wait_for_what_was_removed_or_replaced():
    async def scenario(old, new, *_):
        declared = {"m"}
        service = Service(RouterConfig(), engines := [old], declared=lambda: declared)
        model = await service.model()

        async def refused():
            with pytest.raises(Unavailable, match="'m' was removed or replaced"):
                async with service.generations(model, [Prompt([1])], GREEDY, 0, False):
                    pass

        engines[:] = [new]
        await refused()
        engines.clear()
        declared.clear()
        declared.add("n")
        await refused()

    run(scenario, {"engine_id": "old"}, {"engine_id": "new", "revision": "v2"})


def test_requests_reach_engines_that_serve_what_they_were_made_for():
    """A tokenizer and template are never used with another model's engine."""
    template = "{{ messages[0].content }} is new"

    async def scenario(old, new, *_):
        service = Service(RouterConfig(), engines := [old])
        assert (await service.model()).info.model == "m"
        engines.append(new)
        for i in range(20):
            assert await engine_of(service, [i]) == "old"
        await drained(old)
        assert await engine_of(service) == "new"
        model = await service.model("n")
        assert model.info.model == "other" and model.chat_template == load_template(template)
        with pytest.raises(ApiError, match="does not exist"):
            await service.model("other")

    named = {"served": ServedAs(("n",))}
    other = {"engine_id": "new", "model": "other", "chat_template": template}
    run(scenario, {"engine_id": "old", **named}, {**other, **named})


def test_each_request_reaches_the_engines_of_its_model():
    async def scenario(one, two, *_):
        service = Service(RouterConfig(), engines := [one, two])
        with pytest.raises(ApiError, match="'k' does not exist; there is also, m, other"):
            await service.model("k")
        for i in range(10):
            assert await engine_of(service, [i], "m") == "one"
            assert await engine_of(service, [i], "also") == "two"
        assert [model.id for model in await service.served()] == ["m", "other"]
        with pytest.raises(ApiError, match="model is missing: give one of m, other"):
            await service.model()
        with pytest.raises(ApiError, match="'k' does not exist; there is also, m, other") as error:
            await service.model("k")
        assert error.value.status == 404
        engines.remove(two)  # it died: its model waits, the other one does not
        assert (await service.model("other")).id == "other"
        with pytest.raises(Unavailable) as missing:
            await engine_of(service, name="other")
        assert api_error(missing.value, service.retry_after(missing.value)).headers == {
            "retry-after": "5"
        }
        assert await engine_of(service, name="m") == "one" and service.retry_after() == 1

    other = {"engine_id": "two", "served": ServedAs(("other", "also")), "failover": BRIEF}
    run(scenario, {"engine_id": "one"}, other)


def test_tools_are_refused_where_no_format_of_calls_is_known():
    """The embedded model's is found by its template, unless an option says that there is none."""

    async def scenario(found, without, *_):
        service = Service(RouterConfig(), [found, without])
        use = ToolUse(({"type": "function", "function": {"name": "f"}},))
        assert form_of(await service.model("m"), None, use).calls
        with pytest.raises(ApiError, match="--tool-call-parser names a format") as error:
            form_of(await service.model("n"), None, use)
        assert error.value.info.param == "tools" and error.value.status == 400

    mute = {"engine_id": "two", "served": ServedAs(("n",), tool_call_parser="none")}
    run(scenario, {"engine_id": "one"}, mute)


def test_a_model_that_was_removed_is_unknown_and_one_that_starts_is_not_there_yet():
    async def scenario(one, two, *_):
        declared, known = {"m", "other"}, {"m", "other"}

        async def look():
            known.clear()
            known.update(declared)

        service = Service(RouterConfig(), engines := [one], look=look, declared=lambda: known)
        with pytest.raises(Unavailable, match="no engine is ready yet"):
            await service.model("other")
        engines.append(two)
        assert await engine_of(service, name="other") == "two"
        declared.add("third")  # which this process has not heard of
        with pytest.raises(Unavailable):
            await service.model("third")
        declared.remove("other")
        await drained(two)
        with pytest.raises(ApiError, match="'other' does not exist; there is m, third"):
            await service.model("other")
        assert [model.id for model in await service.served()] == ["m"]

    run(scenario, {"engine_id": "one"}, {"engine_id": "two", "served": ServedAs(("other",))})


def test_an_engine_that_hangs_does_not_keep_what_another_can_take(monkeypatch):
    monkeypatch.setattr("router.service.ADMISSION_PATIENCE", 0.2)

    async def scenario(hung, well, executor, _):
        service = Service(RouterConfig(), [hung, well])
        running = await submit(hung, begin("r", [1, 2, 3], GREEDY))
        executor.gate.clear()
        await asyncio.sleep(0.1)  # it is in a step by now
        asked = set()

        async def note(request, sink, submit=hung.submit):
            asked.add(request.request_id)
            return await submit(request, sink)

        hung.submit = note
        prompts = [[i] * 20 for i in range(8)]
        async with asyncio.timeout(20):
            found = await asyncio.gather(*(engine_of(service, prompt) for prompt in prompts))
        assert set(found) == {"well"} and asked
        executor.gate.set()
        async for _ in running:
            pass
        while hung.load.running or hung.load.waiting:
            await asyncio.sleep(0.001)
        assert executor.steps < 3 * GREEDY.max_tokens  # nothing of theirs was computed

    run(scenario, {"engine_id": "hung"}, {"engine_id": "well"})


def test_retry_after_is_what_is_left_until_an_engine_is_replaced(monkeypatch):
    """OpenAI's clients ask twice more, after so many seconds."""
    clock = SimpleNamespace(now=1020.0103092783505)  # 8 later is 8.0000000001 later, in floats
    monkeypatch.setattr("router.service.time.monotonic", lambda: clock.now)

    async def scenario(engine, *_):
        service = Service(RouterConfig(), engines := [engine])
        await service.model()
        assert service.retry_after() == 1  # that it refused, or another failed, will pass
        engines.clear()
        assert service.retry_after() == 8
        clock.now += 6.5
        assert service.retry_after() == 2
        clock.now += 100
        assert service.retry_after() == 1
        engines.append(engine)
        assert await service.reachable()
        engines.clear()
        assert service.retry_after() == 8
        assert Service(RouterConfig(), []).retry_after() == 5

    run(scenario, {"start_seconds": 3.0})


def test_a_large_model_is_asked_for_as_late_as_clients_heed(monkeypatch):
    async def scenario(engine, *_):
        service = Service(RouterConfig(), engines := [engine])
        await service.model()
        engines.clear()
        assert service.retry_after() == 60

    run(scenario, {"start_seconds": 600.0})


def test_clients_are_not_told_where_an_engine_is():
    trace = "worker 1 (stage 0, tensor rank 1, pid 77 on 10.0.0.3) failed:\nTraceback"
    for cause in (trace, "worker 1 (stage 0, tensor rank 1, pid 77 on fd00::3) failed:"):
        answer = api_error(EngineError(cause))
        assert answer.info.message == "worker 1 (stage 0, tensor rank 1) failed"
        assert answer.status == 503 and answer.headers == {"retry-after": "1"}
