"""Traces as a collector gets them, of requests to the application in this process."""

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from opentelemetry import trace

from cluster.handle import AsyncEngineHandle, NamedEngine
from cluster.transport import RemoteClient
from deploy.cli import main
from engine.config import EMBEDDED_MODEL, FailoverConfig
from engine.tokenizer import Tokenizer
from manta import ConfigError, EngineError, SamplingParams
from router.app import build_app
from router.config import RouterConfig
from router.tracing import make_provider
from tests.support.collector import Collector, Seen, collecting
from tests.support.served import ROOT
from tests.support.server import Server, serving
from tests.support.simulated_engine import EngineProcess
from tests.support.waiting import PATIENCE, until
from workers.checkpoint import resolve

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FROM_CLIENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
SECRET = "swordfish"


def root_of(collector: Collector, trace: str) -> Seen:
    """The root of a trace, all of whose spans hang together, one within the other."""
    spans = {span.id: span for span in collector.spans if span.trace == trace}
    (root,) = [span for span in spans.values() if span.parent not in spans]
    for span in spans.values():
        if span is not root:
            parent = spans[span.parent]
            assert parent.start - 0.01 <= span.start <= span.end <= parent.end + 0.01
    return root


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Server, Collector]]:
    """A server with few blocks, so that it preempts."""
    with (
        collecting() as collector,
        serving(
            {"otlp_endpoint": collector.url, "access_log": True},
            num_gpu_blocks_override=24,
            kv_cache_memory_bytes=None,
            max_model_len=256,
            max_num_seqs=8,
        ) as server,
    ):
        yield server, collector
        server.app.state.tracer_provider.shutdown()


def arrived(server: Server, collector: Collector, trace: str) -> Seen:
    """The root of a trace from a client, once it is there: it ends after its answer."""

    def there() -> bool:
        server.app.state.tracer_provider.force_flush()
        return any((span.trace, span.parent) == (trace, PARENT) for span in collector.spans)

    until(there, PATIENCE)
    return root_of(collector, trace)


def post(server: Server, path: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return httpx.post(server.url + path, json={"model": "manta-demo", **body}, headers=headers)


def test_a_request_is_a_trace_from_the_router_to_the_engine_and_back(
    traced: tuple[Server, Collector], caplog: pytest.LogCaptureFixture
) -> None:
    server, collector = traced
    messages = [{"role": "user", "content": f"Say {SECRET}."}]
    with caplog.at_level("INFO"):
        answer = post(
            server, "/v1/chat/completions", FROM_CLIENT, messages=messages, seed=7, max_tokens=6,
            ignore_eos=True, stop=[SECRET],
        )  # fmt: skip
    usage = answer.json()["usage"]
    root = arrived(server, collector, TRACE)
    assert (root.name, root.parent) == ("POST /v1/chat/completions", PARENT)
    facts = {"http.request.method": "POST", "http.route": "/v1/chat/completions"}
    facts |= {"http.response.status_code": 200, "client.address": "127.0.0.1"}
    facts |= {"manta.request.id": "mine"}
    assert root.attributes.items() >= facts.items() and root.error is None
    assert root.resource["service.name"] == "manta"
    *stages, model = collector.children(root)
    assert [stage.name for stage in stages] == ["validate", "template", "tokenize"]
    assert model.name == "chat manta-demo"
    facts = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "manta-demo"}
    facts |= {"gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.request.seed": 7}
    facts |= {"gen_ai.usage.output_tokens": 6, "gen_ai.response.finish_reasons": ["length"]}
    assert model.attributes.items() >= facts.items()
    first = model.attributes["gen_ai.latency.time_to_first_token"]
    assert 0 <= model.attributes["gen_ai.latency.time_in_queue"] <= first
    (engine,) = collector.children(model)
    assert engine.attributes["manta.engine.id"] == next(iter(server.engines)).info.engine_id
    queue, prefill, decode = collector.children(engine)
    assert [one.name for one in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert queue.end == prefill.start and prefill.end == decode.start
    assert abs(prefill.end - model.start - first) < 0.05
    assert SECRET.encode() not in collector.body
    (line,) = [record for record in caplog.records if record.name == "manta.access"]
    assert line.fields["trace_id"] == TRACE  # type: ignore[attr-defined]


def test_what_is_refused_is_traced_and_what_is_not_sampled_is_not(
    traced: tuple[Server, Collector],
) -> None:
    server, collector = traced
    unsampled = {"traceparent": FROM_CLIENT["traceparent"].replace(TRACE, "1" * 32)[:-2] + "00"}
    refused = {"traceparent": FROM_CLIENT["traceparent"].replace(TRACE, "2" * 32)}
    assert post(server, "/v1/completions", unsampled, prompt="a", max_tokens=1).status_code == 200
    assert httpx.get(f"{server.url}/health", headers=refused).status_code == 200
    assert post(server, "/v1/completions", refused, prompt="a", n=0).status_code == 400
    root = arrived(server, collector, "2" * 32)
    assert "1" * 32 not in {span.trace for span in collector.spans}
    assert root.attributes["http.response.status_code"] == 400
    assert [child.name for child in collector.children(root)] in ([], ["validate"])


def test_preemptions_are_events(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    trace = {"traceparent": FROM_CLIENT["traceparent"].replace(TRACE, "3" * 32)}
    prompts = [f"{i} is a number" for i in range(6)]
    answer = post(server, "/v1/completions", trace, prompt=prompts, max_tokens=120, ignore_eos=True)
    assert answer.json()["usage"]["completion_tokens"] == 6 * 120
    root = arrived(server, collector, "3" * 32)
    model = collector.children(root)[-1]
    assert model.name == "text_completion manta-demo"
    engines = collector.children(model)
    assert sorted(span.attributes["manta.prompt.index"] for span in engines) == list(range(6))
    events = [(span, when) for span in engines for name, when, _ in span.events]
    assert len(events) == model.attributes["manta.preemptions"] > 0
    assert all(span.start <= when <= span.end for span, when in events)


def test_a_request_over_two_engines_is_one_trace() -> None:
    """The first is killed while the request runs there."""
    tokenizer = str(resolve(EMBEDDED_MODEL, None, "auto"))

    async def main(collector: Collector, *processes: EngineProcess) -> None:
        clients = [await RemoteClient.open(process.address) for process in processes]
        for client, name in zip(clients, ("one", "two"), strict=True):
            client.info = replace(client.info, tokenizer=tokenizer, engine_id=name)
        app = build_app(RouterConfig(otlp_endpoint=collector.url), clients)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://here", headers=FROM_CLIENT
        ) as client:
            body = {"prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            while not any(one.load.running for one in clients):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            killed = [bool(one.load.running) for one in clients].index(True)
            processes[killed].process.kill()
            answer = await asking
        for one in clients:
            await one.close()
        await asyncio.to_thread(app.state.tracer_provider.shutdown)
        assert answer.json()["usage"]["completion_tokens"] == 400
        names = ["one", "two"][:: -1 if killed else 1]
        root = root_of(collector, TRACE)
        assert root.parent == PARENT and root.attributes["manta.request.id"] == "mine"
        model = collector.children(root)[-1]
        first, second = collector.children(model)
        assert [span.name for span in (first, second)] == [f"engine {name}" for name in names]
        assert first.error is not None and "is gone" in first.error and second.error is None
        for span in (first, second):
            parts = [child.name for child in collector.children(span)]
            assert parts == ["queue", "prefill", "decode"]
        assert first.end <= second.start
        ((name, when, facts),) = model.events
        assert name == "failover" and abs(when - first.end) < 0.001
        facts_of_move = {"cause": "lost", "from": names[0], "to": names[1]}
        assert {f"manta.failover.{k}": v for k, v in facts_of_move.items()}.items() <= facts.items()
        next_token = collector.children(second)[1].end
        assert abs(facts["manta.failover.seconds"] - (next_token - when)) < 0.001

    with collecting() as collector, EngineProcess() as one, EngineProcess() as two:
        asyncio.run(main(collector, one, two))


def test_a_handle_traces_for_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is left, and one whose engine is killed and not replaced."""
    tokenizer = Tokenizer.load(resolve(EMBEDDED_MODEL, None, "auto"))

    async def main(process: EngineProcess) -> None:
        client = await RemoteClient.open(process.address)
        client.info = replace(
            client.info, failover=FailoverConfig(max_failovers=0), chat_template=None
        )
        handle = AsyncEngineHandle(NamedEngine("here", client), tokenizer)
        long = SamplingParams(max_tokens=400, ignore_eos=True)
        async with contextlib.aclosing(handle.stream(SECRET, long)) as pieces:
            await anext(pieces)
        with trace.get_tracer("test").start_as_current_span("mine"), pytest.raises(EngineError):
            async for _ in handle.stream([1, 2, 3], long):
                process.process.kill()
        await handle.close()

    with collecting() as collector, EngineProcess() as process:
        provider = make_provider(collector.url, "test", "0")
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
        asyncio.run(main(process))
        provider.shutdown()
    left, mine, lost = sorted(
        (span for span in collector.spans if span.parent == "" or "text_comp" in span.name),
        key=lambda span: span.start,
    )
    assert left.parent == "" and left.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert left.error is None and left.attributes["gen_ai.usage.output_tokens"] > 0
    assert lost.parent == mine.id and lost.error is not None and "is gone" in lost.error
    assert collector.children(lost)[0].error == lost.error
    assert SECRET.encode() not in collector.body


def test_what_cannot_be_is_said() -> None:
    for wrong in ("localhost:4317", "grpc://localhost:4317"):
        with pytest.raises(ConfigError, match="otlp_endpoint must be the URL of a collector"):
            RouterConfig.from_options(otlp_endpoint=wrong)
    program = (
        "import sys; sys.modules['opentelemetry.exporter'] = None\n"
        "from router.app import build_app; from router.config import RouterConfig\n"
        "build_app(RouterConfig(), [])\n"
        "from deploy.cli import main\n"
        "sys.exit(main(['serve', '--otlp-endpoint', 'http://here:4318']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    (error,) = done.stderr.splitlines()
    assert done.returncode == 2 and error.endswith("pip install 'manta-serve[otel]'")


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        (ROOT / "docs/operating.md")
        .read_text(encoding="utf-8")
        .partition("## Traces")[2]
        .partition("\n## ")[0]
    )
    (command,) = re.findall(r"^manta (serve .*)$", text, re.MULTILINE)
    words = command.replace("path/or/hub-id", EMBEDDED_MODEL).split()
    shown = []
    for name in ("--otlp-endpoint", "--otlp-traces-endpoint"):
        given = [name if word == "--otlp-endpoint" else word for word in words]
        assert main([*given, "--print-serve-config"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "otlp_endpoint: http://localhost:4318" in shown[0]


def test_without_an_endpoint_nothing_of_it_is_loaded() -> None:
    program = (
        "import sys; from router.app import build_app; from router.config import RouterConfig\n"
        "build_app(RouterConfig(), [])\n"
        "assert not {'router.tracing', 'opentelemetry.sdk'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
