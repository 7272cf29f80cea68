"""``manta bench serve``: latency and throughput of a running OpenAI-compatible server.

Names of options and figures are those of ``vllm bench serve``.
"""

import argparse
import asyncio
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.server_client import ServerClient, ServerError, key_from_environment
from engine.addresses import host_port
from engine.errors import ConfigError

if TYPE_CHECKING:
    from deploy.bench_prompts import Sample
    from deploy.load import Outcome

ENDPOINTS = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    "vllm": "/v1/completions",
}
METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Queue Time", "Waiting in the Client for --max-concurrency"),
}
SAMPLING = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float,
    "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float,
}  # fmt: skip


def add_command(benches: Any) -> None:
    """Add ``serve`` to the subparsers of ``manta bench``."""
    serve = benches.add_parser(
        "serve",
        help="latency and throughput of a running server",
        usage="manta bench serve [OPTION ...]",
        description="Measure a running OpenAI-compatible server with streamed requests.",
    )
    _add_server(serve.add_argument_group("server"))
    _add_prompts(serve.add_argument_group("prompts"))
    _add_load(serve.add_argument_group("load"))
    _add_request(serve.add_argument_group("request"))
    _add_report(serve.add_argument_group("report"))
    serve.set_defaults(run=bench_serve, parser=serve)


def _add_server(server: Any) -> None:
    server.add_argument("--base-url", metavar="URL", help="instead of --host and --port")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--backend", choices=list(ENDPOINTS), default="openai")
    server.add_argument("--endpoint", metavar="PATH", help="default: the backend's")
    server.add_argument("--model", metavar="NAME", help="default: the server's first")
    server.add_argument("--api-key", metavar="KEY", help="default: from the environment")
    server.add_argument("--header", nargs="+", default=[], metavar="NAME=VALUE")
    server.add_argument("--insecure", action="store_true", help="accept any certificate")


def _add_prompts(prompts: Any) -> None:
    prompts.add_argument("--dataset-name", choices=["random", "sharegpt", "custom"])
    prompts.add_argument(
        "--dataset-path",
        metavar="FILE",
        help="sharegpt: JSON or JSONL of conversations; custom: JSON or JSONL with prompt and"
        " output_tokens, or text with a prompt a line",
    )
    prompts.add_argument("--num-prompts", type=int, default=1000)
    prompts.add_argument(
        "--input-len", "--random-input-len", type=int, help="tokens of a random prompt (1024)"
    )
    prompts.add_argument(
        "--output-len",
        "--random-output-len",
        "--sharegpt-output-len",
        "--custom-output-len",
        type=int,
        help="tokens of output (random: 128; files: their own, or 256)",
    )
    prompts.add_argument("--random-range-ratio", type=float, help="vary both lengths by this (0)")
    prompts.add_argument("--random-prefix-len", type=int, help="shared first tokens (0)")
    prompts.add_argument("--tokenizer", metavar="PATH", help="default: the server's, by /tokenize")
    prompts.add_argument("--disable-shuffle", action="store_true", help="the file's own order")
    prompts.add_argument("--seed", type=int, default=0)


def _add_load(load: Any) -> None:
    load.add_argument("--request-rate", type=float, default=math.inf, help="a second; inf: at once")
    load.add_argument(
        "--burstiness", type=float, default=1.0, help="1 is Poisson, less comes in bursts"
    )
    load.add_argument("--max-concurrency", type=int, help="most requests at a time")
    load.add_argument("--num-warmups", type=int, default=0, help="requests that are not measured")
    load.add_argument("--ready-check-timeout-sec", type=float, default=0, metavar="SECONDS")


def _add_request(request: Any) -> None:
    request.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="go on to the full output length (random: yes, files: no)",
    )
    request.add_argument("--extra-body", metavar="JSON", help="more fields of each request")
    for name, kind in SAMPLING.items():
        request.add_argument("--" + name.replace("_", "-"), type=kind)


def _add_report(report: Any) -> None:
    report.add_argument("--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="NAMES")
    report.add_argument("--metric-percentiles", default="50,90,99", metavar="NUMBERS")
    report.add_argument(
        "--goodput",
        nargs="+",
        metavar="NAME:MS",
        help="count requests that keep all of these: ttft, tpot, e2el, itl (its largest gap)",
    )
    report.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    report.add_argument("--save-result", action="store_true", help="write the figures as JSON")
    report.add_argument("--save-detailed", action="store_true", help="and those of each request")
    report.add_argument("--append-result", action="store_true", help="add a line to the file")
    report.add_argument("--result-dir", metavar="FOLDER")
    report.add_argument("--result-filename", metavar="FILE")
    report.add_argument("--label", help="of the result")
    report.add_argument("--metadata", nargs="*", default=[], metavar="NAME=VALUE")


def bench_serve(args: argparse.Namespace) -> None:
    """Run the benchmark that the options ask for, print its figures and write them.

    Raises ConfigError, naming the option, and ServerError if every request failed.
    """
    plan = _Plan(args)
    client = ServerClient(plan.base_url, plan.api_key, plan.headers, verify=not args.insecure)
    _wait_until_ready(client, args.ready_check_timeout_sec)
    model = args.model or client.first_model("/v1/models")
    samples = _samples(args, client, model)
    client.close()
    bodies = [plan.body(model, sample) for sample in samples]

    from deploy.bench_report import Report  # numpy

    outcomes, seconds, cpu_seconds = asyncio.run(_run(args, plan, bodies))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    for text in dict.fromkeys(errors):
        print(f"{errors.count(text)} of {len(outcomes)} requests failed: {text}", file=sys.stderr)
    if len(errors) == len(outcomes):
        raise ServerError("every request failed")
    report = Report(outcomes, seconds, plan.goodput)
    report.figures["client_cpu_us_per_token"] = (
        cpu_seconds / report.figures["total_output_tokens"] * 1e6
    )
    print(report.text(plan.metrics, plan.percentiles, args.max_concurrency, args.request_rate))
    if file := plan.result_file(model):
        figures = {
            **plan.description(model),
            **report.figures,
            **report.statistics(plan.metrics, plan.percentiles),
            **(report.details() if args.save_detailed else {}),
        }
        with file.open("a" if args.append_result else "w", encoding="utf-8") as out:
            out.write(json.dumps(figures) + "\n")


class _Plan:
    """The options, checked before anything is sent."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        for name, least in (
            ("num_prompts", 1), ("max_concurrency", 1), ("num_warmups", 0), ("input_len", 1),
            ("output_len", 1), ("random_prefix_len", 0), ("ready_check_timeout_sec", 0),
        ):  # fmt: skip
            value = getattr(args, name)
            if value is not None and value < least:
                raise ConfigError(f"{_flag(name)} must be at least {least}, got {value}")
        for name in ("request_rate", "burstiness"):
            if not getattr(args, name) > 0:
                raise ConfigError(f"{_flag(name)} must be over 0, got {getattr(args, name)}")
        if args.burstiness != 1 and math.isinf(args.request_rate):
            raise ConfigError("--burstiness needs --request-rate")
        if args.dataset_name is None:
            args.dataset_name = "random" if args.dataset_path is None else "custom"
        self._check_dataset()
        url = args.base_url or f"http://{host_port(args.host, args.port)}"
        self.base_url = url.rstrip("/")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--base-url must start with http:// or https://, got {args.base_url}"
            )
        self.endpoint = args.endpoint or ENDPOINTS[args.backend]
        if self.endpoint.endswith("chat/completions") != (args.backend == "openai-chat"):
            raise ConfigError(f"--endpoint {self.endpoint} does not fit --backend {args.backend}")
        self.headers = _pairs("--header", args.header, "=")
        self.api_key = args.api_key if args.api_key is not None else key_from_environment()
        self.goodput = self._goodput()
        self.metrics = args.percentile_metrics.split(",")
        if unknown := set(self.metrics) - METRICS.keys():
            raise ConfigError(
                f"--percentile-metrics must be of {', '.join(METRICS)}, got {unknown.pop()!r}"
            )
        try:
            self.percentiles = [float(word) for word in args.metric_percentiles.split(",")]
        except ValueError:
            self.percentiles = [-1.0]
        if not all(0 <= p <= 100 for p in self.percentiles):
            raise ConfigError(
                "--metric-percentiles must be numbers from 0 to 100 with commas between, got"
                f" {args.metric_percentiles!r}"
            )
        self.metadata = _pairs("--metadata", args.metadata, "=")
        self.extra_body = self._extra_body()
        self.result_file("model")

    def _check_dataset(self) -> None:
        args = self.args
        if args.dataset_name == "random":
            if args.dataset_path is not None:
                raise ConfigError("--dataset-path needs --dataset-name sharegpt or custom")
            if args.disable_shuffle:
                raise ConfigError("--disable-shuffle needs --dataset-path")
            ratio = args.random_range_ratio or 0.0
            if not 0 <= ratio < 1:
                raise ConfigError(f"--random-range-ratio must be from 0 to below 1, got {ratio}")
        else:
            if args.dataset_path is None:
                raise ConfigError(f"--dataset-name {args.dataset_name} needs --dataset-path")
            for name in ("input_len", "random_range_ratio", "random_prefix_len"):
                if getattr(args, name) is not None:
                    raise ConfigError(f"{_flag(name)} needs --dataset-name random")

    def _goodput(self) -> dict[str, float]:
        bounds = {}
        for name, word in _pairs("--goodput", self.args.goodput or [], ":").items():
            if name not in ("ttft", "tpot", "e2el", "itl"):
                raise ConfigError(f"--goodput must be of ttft, tpot, e2el, itl, got {name!r}")
            try:
                bounds[name] = float(word) / 1000
            except ValueError:
                bounds[name] = -1.0
            if not bounds[name] >= 0:
                raise ConfigError(f"--goodput {name} must be milliseconds, got {word!r}")
        return bounds

    def _extra_body(self) -> dict[str, Any]:
        try:
            extra = json.loads(self.args.extra_body or "{}")
        except ValueError as error:
            raise ConfigError(f"--extra-body must be JSON: {error}") from None
        if not isinstance(extra, dict):
            raise ConfigError(f"--extra-body must be a JSON object, got {self.args.extra_body}")
        return extra

    def body(self, model: str, sample: "Sample") -> bytes:
        """A request, as JSON."""
        args = self.args
        chat = args.backend == "openai-chat"
        body: dict[str, Any] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            ("max_completion_tokens" if chat else "max_tokens"): sample.output_len,
        }
        if chat:
            body["messages"] = [{"role": "user", "content": sample.prompt}]
        else:
            body["prompt"] = sample.prompt
        body |= {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
        if args.ignore_eos or (args.ignore_eos is None and args.dataset_name == "random"):
            body["ignore_eos"] = True
        return json.dumps(body | self.extra_body).encode()

    def description(self, model: str) -> dict[str, Any]:
        """What was run, for the JSON."""
        args = self.args
        return {
            "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
            "label": args.label,
            "backend": args.backend,
            "model_id": model,
            "dataset_name": args.dataset_name,
            "num_prompts": args.num_prompts,
            "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
            "burstiness": args.burstiness,
            "max_concurrency": args.max_concurrency,
            "goodput": self.args.goodput,
            **self.metadata,
        }

    def result_file(self, model: str) -> Path | None:
        """Where the figures go, or None. Raises ConfigError if there is no such folder."""
        args = self.args
        if not (args.save_result or args.save_detailed or args.append_result
                or args.result_dir or args.result_filename):  # fmt: skip
            return None
        concurrency = "" if args.max_concurrency is None else f"-concurrency{args.max_concurrency}"
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        name = f"{args.label or args.backend}-{args.request_rate}qps{concurrency}"
        name = args.result_filename or f"{name}-{model.rstrip('/').split('/')[-1]}-{stamp}.json"
        file = Path(args.result_dir or ".") / name
        if not file.absolute().parent.is_dir():
            raise ConfigError(f"--result-dir, --result-filename: there is no folder {file.parent}")
        return file


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _pairs(option: str, words: Sequence[str], separator: str) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, found, value = word.partition(separator)
        if not found or not name.strip():
            raise ConfigError(f"{option} must be NAME{separator}VALUE, got {word!r}")
        pairs[name.strip()] = value.strip()
    return pairs


def _wait_until_ready(client: ServerClient, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            client.call("/v1/models")
            return
        except ServerError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def _samples(args: argparse.Namespace, client: ServerClient, model: str) -> "list[Sample]":
    from deploy import bench_prompts

    codec: bench_prompts.Codec
    if args.tokenizer:
        codec = bench_prompts.LocalCodec(args.tokenizer)
    else:
        codec = bench_prompts.ServerCodec(client, model)
    if args.dataset_name == "random":
        return bench_prompts.random_samples(
            codec,
            args.num_prompts,
            args.input_len or 1024,
            args.output_len or 128,
            args.random_range_ratio or 0.0,
            args.random_prefix_len or 0,
            args.backend == "openai-chat",
            args.seed,
        )
    return bench_prompts.file_samples(
        bench_prompts.READERS[args.dataset_name],
        args.dataset_path,
        codec,
        args.num_prompts,
        args.output_len,
        not args.disable_shuffle,
        args.seed,
    )


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When each request is due: intervals of a gamma distribution, of a Poisson process at 1.

    They are scaled so that the last is due at ``count / rate``, as ``vllm bench serve`` does.
    """
    if math.isinf(rate):
        return [0.0] * count
    import random

    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    return [t * (count / rate) / now for t in times]


async def _run(
    args: argparse.Namespace, plan: _Plan, bodies: list[bytes]
) -> "tuple[list[Outcome], float, float]":
    from tqdm import tqdm

    from deploy.http_stream import HttpClient
    from deploy.load import Shot, fire

    headers = dict(plan.headers)
    if plan.api_key is not None:
        headers["Authorization"] = f"Bearer {plan.api_key}"
    client = HttpClient(plan.base_url, headers, verify=not args.insecure)
    if args.num_warmups:
        shots = [Shot(0.0, bodies[i % len(bodies)]) for i in range(args.num_warmups)]
        await fire(client, plan.endpoint, shots, args.max_concurrency or args.num_warmups)
    due = arrivals(len(bodies), args.request_rate, args.burstiness, args.seed)
    shots = [Shot(at, body) for at, body in zip(due, bodies, strict=True)]
    with tqdm(total=len(shots), desc="Requests", disable=args.disable_tqdm) as bar:
        before = _cpu_seconds()
        started = time.perf_counter()
        outcomes = await fire(
            client,
            plan.endpoint,
            shots,
            args.max_concurrency,
            args.save_detailed,
            lambda outcome: bar.update(1),
        )
        seconds = time.perf_counter() - started
        cpu_seconds = _cpu_seconds() - before
    client.close()
    return outcomes, seconds, cpu_seconds


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
