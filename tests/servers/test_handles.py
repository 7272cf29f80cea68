"""Named engines: started, found and shared by several drivers of one Ray cluster."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import ray

import manta
from cluster.directory import Directory
from cluster.engines import Engines
from deploy.cli import main
from engine.config import EMBEDDED_MODEL
from manta import (
    ConfigError,
    EngineError,
    RequestError,
    SamplingParams,
    StructuredOutputsParams,
)
from router.app import build_app
from router.config import RouterConfig
from tests.support.collector import collecting
from tests.support.served import ROOT, pids
from tests.support.waiting import PATIENCE, until

OPTIONS = {
    "num_gpu_blocks_override": 200,
    "swap_space": 0.1,
    "max_num_seqs": 8,
    "worker_cpus": 0.5,
}
GREEDY = SamplingParams(temperature=0, max_tokens=12)

DRIVER = """
import sys, manta
from manta import SamplingParams
engine = manta.connect("shared")
print("ready", flush=True)
sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[1]), ignore_eos=True)
try:
    for piece in engine.stream("Once upon a time", sampling):
        pass
    print(piece.finish_reason)
except manta.EngineError as error:
    print(error)
"""


SESSION = f"handles-{os.getpid()}"


@pytest.fixture(scope="module")
def cluster():
    os.environ["MANTA_TEST"] = SESSION
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="WARNING",
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@pytest.fixture(scope="module")
def engine(cluster):
    with manta.start_engine("shared", EMBEDDED_MODEL, **OPTIONS) as handle:
        yield handle


def drivers(count, tokens):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tokens)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    for driver in started:
        assert driver.stdout.readline() == "ready\n"
    return started


def test_an_ingress_process_finds_an_engine_before_it_refuses_for_want_of_one(engine):
    """Another may have called it healthy already: a request must not depend on who takes it."""

    async def ask(path, **body):
        engines = Engines("engine:shared")  # not opened: it looks only when it is told to
        app = build_app(RouterConfig(), engines, look=engines.look)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            response = await (client.post(path, json=body) if body else client.get(path))
        await engines.close()
        return response.status_code

    assert asyncio.run(ask("/health")) == 200
    request = {"prompt": "Hello", "max_tokens": 2}
    assert asyncio.run(ask("/v1/completions", model=EMBEDDED_MODEL, **request)) == 200


def test_structured_outputs(engine):
    choice = StructuredOutputsParams(choice=["yes", "no"])
    params = SamplingParams(temperature=1, seed=1, structured_outputs=choice)
    (output,) = engine.generate(["Is it so?"], params)
    text = "".join(piece.text for piece in engine.stream("Is it so?", params))
    assert output.outputs[0].text == text and text in ("yes", "no")
    wrong = SamplingParams(structured_outputs=StructuredOutputsParams(json={"not": {}}))
    with pytest.raises(RequestError, match="prompt 0: structured_outputs.json: .*not"):
        engine.generate(["Is it so?"], wrong)
    with pytest.raises(RequestError, match="^structured_outputs.json: .*not"):
        next(iter(engine.stream("Is it so?", wrong)))


def test_a_look_that_is_given_up_spoils_no_other(engine):
    async def main():
        engines = Engines("engine:shared")
        first = asyncio.create_task(engines.look())
        await asyncio.sleep(0)
        second, third = (asyncio.create_task(engines.look()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        await third
        assert [client.healthy for client in engines] == [True]
        await engines.close()

    asyncio.run(main())


def test_one_that_does_not_answer_keeps_nobody_waiting(engine):
    """As a stopped process: its port takes connections, and nothing comes."""

    async def main():
        engines = Engines("engine:shared")
        for waits in (True, False):  # the first look learns it
            started = time.monotonic()
            await engines.look()
            assert (time.monotonic() - started > 1.9) == waits
            assert [client.healthy for client in engines] == [True]
        await engines.close()  # while it is still being tried
        assert not engines._connecting and not engines._clients

    directory = Directory("engine:shared")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        entry = "engine", "deaf", f"127.0.0.1 {deaf.getsockname()[1]} key"
        directory.add(*entry)
        try:
            asyncio.run(main())
        finally:
            directory.remove(*entry)


def value(engine, name):
    metric = next(m for m in engine.metrics() if m.name == name)
    return sum(sample.value for sample in metric.samples)


def idle(engine):
    names = ("num_requests_running", "num_requests_waiting", "kv_blocks_used")
    return not any(value(engine, name) for name in names)


def test_text_and_chat_are_the_offline_engines(engine):
    llm = manta.LLM(kv_cache_memory_bytes=16 << 20, swap_space=0.1)
    prompts = ["The capital of France is", [5, 6, 7], {"prompt": "Hello"}]
    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    outputs = engine.generate(prompts, GREEDY)
    assert [o.outputs[0] for o in outputs] == [o.outputs[0] for o in expected]
    messages = [{"role": "user", "content": "Tell me a joke."}]
    answer = llm.chat(messages, GREEDY, use_tqdm=False)[0].outputs[0]
    assert engine.chat(messages, GREEDY)[0].outputs[0] == answer
    pieces = list(engine.stream_chat(messages, GREEDY))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [t for piece in pieces for t in piece.token_ids] == answer.token_ids
    assert pieces[-1].finish_reason == answer.finish_reason
    stop = SamplingParams(temperature=0, max_tokens=12, stop=answer.text[8:12])
    (stopped,) = engine.chat(messages, stop)
    assert stopped.outputs[0].text == answer.text[:8]
    assert stopped.outputs[0].finish_reason == "stop"
    assert idle(engine)


def test_asyncio_programs_have_a_handle_of_their_own(engine):
    async def main():
        handle = await manta.connect_async("shared")

        async def text(prompt):
            return "".join([p.text async for p in handle.stream(prompt, GREEDY)])

        prompts = ["Hello", "The sky is", "One, two,"]
        streamed = await asyncio.gather(*map(text, prompts))
        outputs = await handle.generate(prompts, GREEDY)
        assert streamed == [output.outputs[0].text for output in outputs]
        assert handle.healthy and handle.info.model == EMBEDDED_MODEL
        long = SamplingParams(max_tokens=1500, ignore_eos=True)
        task = asyncio.create_task(handle.generate(["Hello"] * 4, long))
        while not handle.load.running:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await handle.close()

    asyncio.run(main())
    until(lambda: idle(engine))


def test_the_traces_of_a_program_go_on_to_the_engine(engine):
    """The example of the documentation."""
    text = (ROOT / "docs/operating.md").read_text().partition("## Traces")[2].partition("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with collecting() as collector:
        variables = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        subprocess.run([sys.executable, "-c", program], env=variables, check=True)
    (report,) = [span for span in collector.spans if span.name == "report"]
    models = collector.children(report)
    assert [span.name for span in models] == [f"text_completion {EMBEDDED_MODEL}"] * 2
    for span in models:
        assert span.attributes["gen_ai.usage.output_tokens"] > 0
        (stay,) = collector.children(span)
        assert stay.name == f"engine {engine.info.engine_id}"
        parts = collector.children(stay)
        assert [part.name for part in parts] == ["queue", "prefill", "decode"]
        assert report.start <= span.start <= parts[2].end <= span.end <= report.end


def test_what_is_wrong_is_said(engine):
    with pytest.raises(RequestError, match=r"prompt 1: prompt .* max_model_len"):
        engine.generate(["a", [1] * 5000], GREEDY)
    with pytest.raises(RequestError, match="priority needs scheduling_policy"):
        engine.generate("a", GREEDY, priority=[1])
    with pytest.raises(RequestError, match="a stream has one prompt, got 2"):
        next(engine.stream(["a", "b"], GREEDY))
    with pytest.raises(EngineError, match="there is no engine called 'nobody'"):
        manta.connect("nobody")
    with pytest.raises(ConfigError, match="an engine called 'shared' runs already"):
        manta.start_engine("shared", EMBEDDED_MODEL)
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        manta.start_engine("other", EMBEDDED_MODEL, max_num_seq=1)
    with pytest.raises(manta.CheckpointError, match="no/such/model"):
        manta.start_engine("other", "./no/such/model", worker_cpus=0.5)
    with pytest.raises(ConfigError, match="no room for engine 'other' .* it needs 64 CPU; .* CPU"):
        manta.start_engine("other", EMBEDDED_MODEL, worker_cpus=64, placement_timeout=0.5)
    with pytest.raises(EngineError, match="there is no engine called 'other'"):
        manta.connect("other")


def test_rays_own_agent_has_the_metrics(engine):
    engine.generate("Hello", GREEDY)
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    name = "ray_manta_generation_tokens_total"

    def told():
        lines = [line for line in httpx.get(url).text.splitlines() if line.startswith(name)]
        return [float(line.rsplit(" ", 1)[1]) for line in lines]

    until(lambda: told() == [value(engine, "generation_tokens")])
    assert 'le="0.0015"' in httpx.get(url).text


def test_leaving_a_stream_cancels_it(engine):
    long = SamplingParams(max_tokens=1500, ignore_eos=True)
    for piece in engine.stream("Hello", long):
        assert piece.finish_reason is None
        break
    until(lambda: idle(engine))


def test_many_drivers_and_one_that_is_killed(engine):
    others = drivers(3, 1500)
    until(lambda: value(engine, "num_requests_running") == 3)
    others[0].kill()
    seconds = until(lambda: value(engine, "num_requests_running") < 3)
    print(f"freed {seconds * 1e3:.0f} ms after its driver was killed")
    for other in others[1:]:
        assert other.communicate(timeout=PATIENCE)[0] == "length\n"
    others[0].communicate()
    assert idle(engine)


def batch(folder, count):
    """A file of so many requests, and what the "shared" engine says to each prompt."""
    lines = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "prompt": f"Number {i}",
                "temperature": 0,
                "max_tokens": 60,
                "ignore_eos": True,
            },
        }
        for i in range(count)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {line["custom_id"]: line["body"]["prompt"] for line in lines}


def test_a_batch_over_several_engines_of_which_one_is_killed(engine, tmp_path):
    prompts = batch(tmp_path, 60)
    before = actors()
    words = ["run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    words += ["--num-replicas", "2", "--max-concurrency", "12", "--no-use-tqdm-on-load"]
    for name in ("num_gpu_blocks_override", "swap_space", "worker_cpus"):
        words += [f"--{name}", str(OPTIONS[name])]
    killed = []

    def strike():
        until(lambda: (tmp_path / "out.jsonl").exists() and len(read(tmp_path)) > 5, PATIENCE)
        killed.append(max(actors() - before))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=strike)
    thread.start()
    assert main(words) == 0
    thread.join()
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    outputs = engine.generate(list(prompts.values()), params)
    expected = {id: one.outputs[0].text for id, one in zip(prompts, outputs, strict=True)}
    answers = read(tmp_path)
    assert len(answers) == 60 and killed
    found = {one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in answers}
    assert found == expected
    until(lambda: actors() == before)


def read(folder):
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def actors():
    return set(pids(SESSION, "EngineActor"))


def test_a_stage_of_ray_data(engine, capsys):
    """The example of the documentation."""
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/batches.md").read_text(), re.DOTALL
    )
    options = {name: OPTIONS[name] for name in ("num_gpu_blocks_override", "swap_space")}
    options |= {"worker_cpus": 0.5, "use_tqdm_on_load": False}
    given = "".join(f", {name}={value}" for name, value in options.items())
    text = example.replace("concurrency=1", f"concurrency=1{given}")
    exec(compile(text.replace("path/or/hub-id", EMBEDDED_MODEL), "docs/batches.md", "exec"), {})
    answers = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert answers.keys() == {"France", "Italy", "Spain"} and "Paris" in answers["France"]


def engine_pid():
    (found,) = pids(SESSION, "EngineActor")
    return found


def test_an_engine_that_is_killed_comes_again_and_its_requests_go_on(engine):
    """The last that uses it."""
    sampling = SamplingParams(max_tokens=1500, ignore_eos=True, seed=5, temperature=1, logprobs=1)
    expected = engine.generate(["Hello", "The sky"], sampling)
    others = drivers(2, 1500)
    pid = engine_pid()
    done = threading.Event()

    def strike():
        until(lambda: value(engine, "num_requests_running") == 4)
        os.kill(pid, signal.SIGKILL)
        done.set()

    thread = threading.Thread(target=strike)
    thread.start()
    found = engine.generate(["Hello", "The sky"], sampling)
    thread.join()
    assert done.is_set() and [one.outputs for one in found] == [one.outputs for one in expected]
    for other in others:
        assert other.communicate(timeout=PATIENCE)[0] == "length\n"
    assert engine_pid() != pid
    manta.stop_engine("shared")
    assert _free("shared")
    with pytest.raises(EngineError, match="no engine called 'shared'"):
        engine.generate("Hello", GREEDY)


def _free(name):
    try:
        manta.connect(name, timeout=1)
    except EngineError as error:
        return "there is no engine" in str(error)
    return False


@pytest.mark.parametrize("stuck", [False, True])
def test_an_engine_outlives_its_starter_and_is_stopped_by_name(cluster, monkeypatch, stuck):
    monkeypatch.setattr("cluster.engine_actor.STOP_SECONDS", 1.0)
    program = (
        f"import manta, sys\nmanta.start_engine('lasting', {EMBEDDED_MODEL!r}, **{OPTIONS!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with manta.connect("lasting") as engine:
        assert engine.generate("Hello", GREEDY)[0].outputs[0].finish_reason
    if stuck:
        os.kill(engine_pid(), signal.SIGSTOP)
    manta.stop_engine("lasting", drain_seconds=1.0)
    assert _free("lasting")
