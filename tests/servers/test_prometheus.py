"""A real Prometheus scrapes a loaded server: every metric is there, the counters add up, and what
the dashboards and alerts of deploy/grafana ask for has an answer."""

import asyncio
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from cluster.processes import descendants
from deploy.http_stream import HttpClient
from deploy.load import Outcome, Shot, fire
from deploy.ports import free_ports
from tests.support.served import ROOT, Served, serve
from tests.support.waiting import PATIENCE, until

MODEL = "manta-demo"
# Few blocks and a short queue: requests are preempted, and refused.
OPTIONS = [
    "--num-gpu-blocks-override", "48", "--max-num-seqs", "12", "--max-queued-requests", "24",
    "--max-model-len", "512", "--swap-space", "0.01",
]  # fmt: skip
# What vLLM's dashboards show of a server, under manta's prefix.
FROM_VLLM = [
    "prompt_tokens_total", "prompt_tokens_by_source_total", "prompt_tokens_cached_total",
    "generation_tokens_total", "request_success_total", "num_preemptions_total",
    "corrupted_requests_total", "admission_rejections_total", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "num_requests_running", "num_requests_waiting",
    "num_requests_waiting_by_reason", "kv_cache_usage_perc", "iteration_tokens_total",
    "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_inference_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_params_max_tokens", "request_params_n",
    "request_prefill_kv_computed_tokens", "request_max_num_generation_tokens", "cache_config_info",
]  # fmt: skip
OUR_OWN = [
    "preemptions_by_kind_total", "swapped_out_bytes_total", "swapped_in_bytes_total",
    "recomputed_tokens_total", "cpu_kv_blocks_used", "step_time_seconds", "vectors_total",
    "router_stage_seconds", "http_requests_total",
]  # fmt: skip

SHIPPED = ROOT / "deploy" / "grafana"
OF_FAILOVERS = ("failover_seconds_bucket",)  # the last test has one
OF_GPUS = ("ray_node_gpu", "ray_node_gram")
VARIABLES = {"$model": ".*", "$engine": ".*", "$__rate_interval": "5m"}


class Prometheus:
    """A running Prometheus, and questions to it."""

    def __init__(self, port: int) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}")

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series of an instant query; none while it starts."""
        try:
            answer = self._http.get("/api/v1/query", params={"query": query}).json()
        except (httpx.HTTPError, ValueError):
            return []
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def sum(self, name: str, **labels: str) -> float:
        """The sum of a metric's series with these labels, as last scraped."""
        selector = ",".join(f'{key}="{value}"' for key, value in labels.items())
        series = self.ask(f"last_over_time(manta:{name}{{{selector}}}[5m])")
        assert series, f"no {name} {labels}"
        return sum(float(one["value"][1]) for one in series)

    def names(self) -> set[str]:
        """The names of all series of manta's."""
        values = self._http.get("/api/v1/label/__name__/values").json()["data"]
        return {name.removeprefix("manta:") for name in values if name.startswith("manta:")}

    def wait_for_scrape(self) -> None:
        """Until what it says was counted after this call."""
        # (timestamp() of a comparison would be the time of the question.)
        now, scraped = time.time(), 'timestamp(up{job="manta"}) and up{job="manta"} == 1'
        until(lambda: any(float(one["value"][1]) > now for one in self.ask(scraped)), PATIENCE)


@pytest.fixture(scope="module")
def ray_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture(scope="module")
def server(ray_folder: Path) -> Iterator[Served]:
    with serve(*OPTIONS, RAY_TMPDIR=str(ray_folder)) as served:
        yield served


@pytest.fixture(scope="module")
def prometheus(
    server: Served, ray_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    assert shutil.which("prometheus"), "Prometheus is needed: apt-get install prometheus"
    folder: Path = tmp_path_factory.mktemp("prometheus")
    (agent,) = ray_folder.glob("manta-*/ray/session_2*/metrics_export_port_*")
    ports = {"manta": server.port, "ray": int(agent.read_text())}
    config = {
        "global": {
            "scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s",
        },
        "rule_files": [str(SHIPPED / "alerts.yml")],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
            for name, port in ports.items()
        ],
    }  # fmt: skip
    (folder / "prometheus.yml").write_text(json.dumps(config))
    (port,) = free_ports(1)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder / 'prometheus.yml'}",
             f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def load(server: Served) -> list[Outcome]:
    """48 requests at once, of which the queue refuses some, and wrong ones among them."""
    shots = []
    for i in range(48):
        body = {
            "model": MODEL, "prompt": f"This is story {i % 40}: " + "once upon a time " * (i % 9),
            "max_tokens": 100 + 8 * (i % 20), "temperature": 1.0, "seed": i, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": i % 3 != 0,
        }  # fmt: skip
        if i % 12 == 5:
            body["prompt"] = "word " * 1000
        shots.append(Shot(at=0.0, body=json.dumps(body).encode()))
    return asyncio.run(fire(HttpClient(server.url), "/v1/completions", shots))


def test_counters_add_up_to_what_clients_received(server: Served, prometheus: Prometheus) -> None:
    outcomes = load(server)
    good = [outcome for outcome in outcomes if not outcome.error]
    refused = Counter(outcome.error[:3] for outcome in outcomes if outcome.error)
    assert len(good) >= 24 and refused["429"] >= 1 and refused["400"] == 4
    assert len(good) + refused["429"] + refused["400"] == len(outcomes)
    prometheus.wait_for_scrape()
    prompt = sum(outcome.prompt_tokens for outcome in good)
    output = sum(outcome.output_tokens for outcome in good)
    assert prometheus.sum("prompt_tokens_total") == prompt
    assert prometheus.sum("generation_tokens_total") == output
    assert prometheus.sum("prompt_tokens_by_source_total") == prompt
    for reason in ("stop", "length", "abort", "error"):
        received = sum(outcome.finish_reason == reason for outcome in good)
        assert prometheus.sum("request_success_total", finished_reason=reason) == received
    for name, sums in (
        ("request_prompt_tokens", prompt),
        ("request_generation_tokens", output),
        ("time_to_first_token_seconds", None),
        ("e2e_request_latency_seconds", None),
        ("request_queue_time_seconds", None),
        ("request_prefill_time_seconds", None),
        ("request_decode_time_seconds", None),
        ("request_params_max_tokens", None),
    ):
        assert prometheus.sum(f"{name}_count") == len(good), name
        assert prometheus.sum(f"{name}_bucket", le="+Inf") == len(good)
        if sums is not None:
            assert prometheus.sum(f"{name}_sum") == sums
    assert prometheus.sum("inter_token_latency_seconds_count") == output - len(good)
    # Times: of the engine, so within what the clients measured.
    assert 0 < prometheus.sum("e2e_request_latency_seconds_sum") <= sum(o.latency for o in good)
    assert 0 < prometheus.sum("time_to_first_token_seconds_sum") <= sum(o.ttft for o in good)
    # The load had what is counted here, and it counts the same thing twice.
    preemptions = prometheus.sum("num_preemptions_total")
    assert preemptions > 0 and preemptions == prometheus.sum("preemptions_by_kind_total")
    assert preemptions == prometheus.sum("request_num_preemptions_sum")
    for status, count in (("200", len(good)), ("400", refused["400"]), ("429", refused["429"])):
        labels = {"handler": "/v1/completions", "status": status}
        assert prometheus.sum("http_requests_total", **labels) == count
    for name in ("num_requests_running", "num_requests_waiting", "kv_blocks_used"):
        assert prometheus.sum(name) == 0


def test_clients_that_vanish_are_counted(server: Served, prometheus: Prometheus) -> None:
    prometheus.wait_for_scrape()
    before = prometheus.sum("request_success_total", finished_reason="abort")
    body = {"model": MODEL, "prompt": "x", "max_tokens": 400, "stream": True, "ignore_eos": True}
    whole = {**body, "stream": False, "n": 16, "temperature": 1}
    for _ in range(3):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            next(answer.iter_raw())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=whole, timeout=0.2)
    until(
        lambda: prometheus.sum("request_success_total", finished_reason="abort") == before + 51,
        PATIENCE,
    )
    gone = {"handler": "/v1/completions", "status": "499"}
    until(lambda: prometheus.sum("http_requests_total", **gone) == 3, PATIENCE)
    until(lambda: prometheus.sum("num_requests_running") == 0, PATIENCE)


def test_every_metric_is_there(server: Served, prometheus: Prometheus) -> None:
    prometheus.wait_for_scrape()
    text = httpx.get(f"{server.url}/metrics").text
    families = dict(re.findall(r"^# TYPE manta:(\S+) (\S+)$", text, re.MULTILINE))
    assert families.keys() >= {*FROM_VLLM, *OUR_OWN}
    known = prometheus.names()
    for family, kind in families.items():
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        assert {family + suffix for suffix in suffixes} <= known
    # Buckets resolve inter-token latencies of a millisecond.
    bounds = sorted(
        float(one["metric"]["le"])
        for one in prometheus.ask("manta:inter_token_latency_seconds_bucket")
    )
    assert len([bound for bound in bounds if bound <= 0.004]) >= 3
    for one in prometheus.ask("manta:generation_tokens_total"):
        assert one["metric"]["model_name"] == MODEL and one["metric"]["engine"]


def promtool(server: Served, names: str) -> subprocess.CompletedProcess[str]:
    text = httpx.get(f"{server.url}/metrics", params={"names": names}).text
    command = ["promtool", "check", "metrics"]
    return subprocess.run(command, input=text, capture_output=True, text=True)


def test_promtool_is_content(server: Served) -> None:
    done = promtool(server, "prometheus")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_promtool_finds_nothing_but_the_names_of_vllm(server: Served) -> None:
    """Its lint dislikes a colon in a name, which vLLM's names have, and one name of vLLM's."""
    done = promtool(server, "vllm")
    complaints = [line for line in done.stderr.splitlines() if "should not contain ':'" not in line]
    assert complaints == [
        'manta:iteration_tokens_total non-counter metrics should not have "_total" suffix'
    ]
    assert done.returncode == 3  # lint; 1 would be text that cannot be parsed


# ---- what is shipped for Grafana and Prometheus ----


def shipped_queries() -> Iterator[tuple[str, str]]:
    """(where, query) of every panel; of alerts what is compared last with a number."""
    for file in sorted(SHIPPED.glob("dashboards/*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"]
                for name, value in VARIABLES.items():
                    query = query.replace(name, value)
                yield f"{file.stem}: {panel['title']}", query
    for rule in yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"][0]["rules"]:
        value = re.fullmatch(r"(.*) (?:>|==) [\d.]+", rule["expr"])
        assert value is not None, rule
        yield rule["alert"], value[1].replace("manta:", "${prefix}")


@pytest.mark.parametrize("prefix", ["manta:", "ray_manta_"])
def test_every_panel_and_alert_has_data(
    prefix: str, server: Served, prometheus: Prometheus
) -> None:
    """Under the names of /metrics, and under those that Ray's own Prometheus has."""
    queries = list(shipped_queries())
    assert len(queries) > 70
    exempt = OF_FAILOVERS if torch.cuda.is_available() else OF_FAILOVERS + OF_GPUS
    missing = {
        (where, query.replace("${prefix}", prefix))
        for where, query in queries
        if not any(name in query for name in exempt) and not query.startswith("absent(")
    }
    assert len(missing) > 60

    def all_there() -> bool:
        for where, query in sorted(missing):
            answers = [float(one["value"][1]) for one in prometheus.ask(query)]
            if any(math.isfinite(answer) for answer in answers):
                missing.discard((where, query))
        return not missing

    until(lambda: bool(prometheus.ask(f"{prefix}num_preemptions_total > 0")), PATIENCE)
    if prefix != "manta:":  # Ray's agent knew nothing of the first load until it was over
        load(server)
    try:
        until(all_there, PATIENCE)
    except AssertionError:
        raise AssertionError("\n".join(map(str, sorted(missing)))) from None


def test_an_alert_is_raised_by_what_it_is_for(server: Served, prometheus: Prometheus) -> None:
    """That on KV blocks; it has ten minutes to last before it would be sent."""
    pressure = 'ALERTS{alertname="MantaKvPressure",alertstate="pending"}'
    for _ in range(10):
        load(server)
        if prometheus.ask(pressure):
            break
    until(lambda: bool(prometheus.ask(pressure)), PATIENCE)
    raised = {one["metric"]["alertname"] for one in prometheus.ask("ALERTS")}
    assert not raised & {"MantaGone", "MantaNoEngine", "MantaNoProgress", "MantaErrors"}


def test_a_failover_is_counted_and_raised(server: Served, prometheus: Prometheus) -> None:
    """The engine is killed in the middle of a stream, which goes on at its successor."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 400, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=PATIENCE) as answer:
        pieces = answer.iter_text()
        next(pieces)
        (engine,) = [
            one.pid
            for one in descendants([server.process.pid])
            if re.search(
                rb"ServeReplica:manta.*:Engine", Path(f"/proc/{one.pid}/cmdline").read_bytes()
            )
        ]
        os.kill(engine, signal.SIGKILL)
        assert '"completion_tokens":400' in "".join(pieces)
    until(lambda: prometheus.sum("requests_moved_total", cause="lost") == 1, PATIENCE)
    queries = [q for _, q in shipped_queries() if any(name in q for name in OF_FAILOVERS)]
    assert queries
    for query in queries:
        text = query.replace("${prefix}", "manta:")
        until(lambda text=text: any(math.isfinite(float(one["value"][1]))
                                    for one in prometheus.ask(text)), PATIENCE)  # fmt: skip
    raised = 'ALERTS{alertname="MantaFailovers",alertstate="firing",cause="lost"}'
    until(lambda: bool(prometheus.ask(raised)), PATIENCE)
