"""GET /metrics of a server that has answered: what it says is what the clients saw."""

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import Server, serving

FRANCE = "The capital of France is"
# What dashboards made for vLLM ask for.
VLLM_NAMES = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
    "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
    "prompt_tokens_total", "generation_tokens_total", "request_success_total",
    "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
    "iteration_tokens_total_bucket", "request_params_n_bucket",
    "request_params_max_tokens_bucket", "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket", "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving({"served_model_name": "m"}) as server:
        yield server


Samples = dict[str, list[tuple[dict[str, str], float]]]


def scrape(server: Server) -> Samples:
    response = httpx.get(f"{server.url}/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples: Samples = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            samples.setdefault(sample.name.removeprefix("manta:"), []).append(
                (sample.labels, sample.value)
            )
    return samples


def total(samples: Samples, name: str, **labels: str) -> float:
    found = [v for with_, v in samples[name] if labels.items() <= with_.items()]
    assert found, (name, labels)
    return sum(found)


def test_metrics_are_what_clients_saw(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").is_success  # it knows its model from then on
    before = scrape(server)
    assert set(VLLM_NAMES) <= set(before)
    prompt = completion = choices = 0
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        for number in range(5):
            answer = client.completions.create(
                model="m", prompt=[FRANCE, "Hello"], n=2, max_tokens=5 + number, seed=number
            )
            assert answer.usage is not None
            prompt += answer.usage.prompt_tokens
            completion += answer.usage.completion_tokens
            choices += len(answer.choices)
        options: Any = {"include_usage": True}
        stream = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Tell me a joke."}],
            stream=True,
            stream_options=options,
        )
        *_, last = stream
        assert last.usage is not None
        prompt += last.usage.prompt_tokens
        completion += last.usage.completion_tokens
        choices += 1
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="x", prompt=FRANCE)
    after = scrape(server)

    def grown(name: str, **labels: str) -> float:
        old = sum(v for with_, v in before.get(name, []) if labels.items() <= with_.items())
        return total(after, name, **labels) - old

    assert grown("prompt_tokens_total", model_name="m") == prompt
    assert grown("generation_tokens_total", model_name="m") == completion
    assert grown("request_success_total") == choices
    assert grown("request_generation_tokens_sum") == completion
    assert grown("request_generation_tokens_count") == choices
    answers = {"handler": "/v1/completions", "status": "200", "model_name": "m"}
    assert grown("http_requests_total", **answers) == 5
    assert grown("http_requests_total", **answers | {"status": "404", "model_name": ""}) == 1
    assert grown("http_requests_total", handler="/v1/chat/completions", status="200") == 1
    assert grown("router_stage_seconds_count", stage="validate", model_name="m") == 6
    assert grown("router_stage_seconds_count", stage="validate", model_name="") == 1
    assert grown("router_stage_seconds_count", stage="template", model_name="m") == 1
    assert grown("router_stage_seconds_count", stage="first_token", model_name="m") == 11
    # A name that no model has is no label's value: a client could make any number of them.
    assert {labels.get("model_name", "") for series in after.values() for labels, _ in series} == {
        "", "m"
    }  # fmt: skip
    assert total(after, "router_requests_in_flight") == 0


def test_labels_and_buckets(server: Server) -> None:
    samples = scrape(server)
    (engine,) = server.engines
    labels, _ = samples["num_requests_running"][0]
    assert labels == {"model_name": "m", "engine": engine.info.engine_id}
    assert total(samples, "requests_moved_total", model_name="m", cause="lost") == 0
    assert total(samples, "engines", model_name="m", state="healthy") == 1
    labels, _ = samples["router_requests_in_flight"][0]
    assert labels == {"ingress": server.service.id}
    buckets = samples["inter_token_latency_seconds_bucket"]
    bounds = [float(labels["le"]) for labels, _ in buckets]
    assert sum(bound <= 0.003 for bound in bounds) >= 5  # fine enough for 1 ms
    counts = [count for _, count in buckets]
    assert counts == sorted(counts) and bounds[-1] == float("inf")
    assert counts[-1] == total(samples, "inter_token_latency_seconds_count")


def test_promtool_finds_nothing_but_the_names(server: Server) -> None:
    """Its lint forbids the colon of vLLM's names, and one of them that ends like a counter's."""
    text = httpx.get(f"{server.url}/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    complaints = done.stderr.decode().splitlines() + done.stdout.decode().splitlines()
    expected = (
        "metric names should not contain ':'",
        'iteration_tokens_total non-counter metrics should not have "_total" suffix',
    )
    assert [line for line in complaints if not line.endswith(expected)] == []


def test_names_as_prometheus_wants_them(server: Server) -> None:
    def samples(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("#")]

    theirs = httpx.get(f"{server.url}/metrics", params={"names": "vllm"}).text
    ours = httpx.get(f"{server.url}/metrics", params={"names": "prometheus"}).text
    renamed = theirs.replace("manta:iteration_tokens_total", "manta:iteration_tokens")
    assert len(samples(theirs)) > 200 and ":iteration_tokens_total_count" in theirs
    assert [line.split(" ")[0] for line in samples(renamed.replace("manta:", "manta_"))] == [
        line.split(" ")[0] for line in samples(ours)
    ]
    wrong = httpx.get(f"{server.url}/metrics", params={"names": "other"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "names"
    assert "vllm or prometheus" in wrong.json()["error"]["message"]
