"""The figures of a load on a server, with the names of ``vllm bench serve``."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deploy.bench_serve import METRICS
from deploy.load import Outcome


class Report:
    """Figures of the requests that were answered; those that failed are only counted.

    goodput: by metric, the most seconds with which a request counts as good.
    """

    def __init__(
        self, outcomes: Sequence[Outcome], seconds: float, goodput: dict[str, float]
    ) -> None:
        self.all = outcomes
        self.good = good = [outcome for outcome in outcomes if not outcome.error]
        self.seconds: dict[str, list[float]] = {
            "ttft": [o.ttft for o in good],
            "tpot": [o.time_per_token for o in good if o.output_tokens > 1],
            "itl": [gap for o in good for gap in o.gaps],
            "e2el": [o.latency for o in good],
            "client_queue_time": [o.sent - o.due for o in good],
        }
        num_input = sum(o.prompt_tokens for o in good)
        num_output = sum(o.output_tokens for o in good)
        num_events = sum(len(o.times) for o in good)
        self.figures: dict[str, Any] = {
            "duration": seconds,
            "completed": len(good),
            "failed": len(outcomes) - len(good),
            "total_input_tokens": num_input,
            "total_output_tokens": num_output,
            "request_throughput": len(good) / seconds,
            "request_goodput": sum(_keeps(o, goodput) for o in good) / seconds if goodput else None,
            "output_throughput": num_output / seconds,
            "total_token_throughput": (num_input + num_output) / seconds,
            "tokens_per_event": num_output / max(1, num_events),
            "max_concurrent_requests": _most_at_once(good),
        }

    def statistics(self, metrics: Sequence[str], percentiles: Sequence[float]) -> dict[str, float]:
        """``mean_ttft_ms``, ``p99_itl_ms`` and so on."""
        found = {}
        for name in metrics:
            values = np.asarray(self.seconds[name] or [0.0]) * 1000
            found[f"mean_{name}_ms"] = float(values.mean())
            found[f"median_{name}_ms"] = float(np.median(values))
            found[f"std_{name}_ms"] = float(values.std())
            for p in percentiles:
                found[f"p{p:g}_{name}_ms"] = float(np.percentile(values, p))
        return found

    def text(
        self,
        metrics: Sequence[str],
        percentiles: Sequence[float],
        max_concurrency: int | None,
        request_rate: float,
    ) -> str:
        """The figures for people."""
        f = self.figures
        lines = [f"{' Serving Benchmark Result ':=^50}"]

        def line(name: str, value: float | int | None, digits: int = 2) -> None:
            if value is not None:
                shown = value if isinstance(value, int) else f"{value:.{digits}f}"
                lines.append(f"{name + ':':<40} {shown:<10}".rstrip())

        line("Successful requests", f["completed"])
        line("Failed requests", f["failed"])
        line("Maximum request concurrency", max_concurrency)
        line("Request rate configured (RPS)", None if math.isinf(request_rate) else request_rate)
        line("Benchmark duration (s)", f["duration"])
        line("Total input tokens", f["total_input_tokens"])
        line("Total generated tokens", f["total_output_tokens"])
        line("Request throughput (req/s)", f["request_throughput"])
        line("Request goodput (req/s)", f["request_goodput"])
        line("Output token throughput (tok/s)", f["output_throughput"])
        line("Total token throughput (tok/s)", f["total_token_throughput"])
        line("Peak concurrent requests", f["max_concurrent_requests"])
        line("Tokens per event", f["tokens_per_event"])
        line("Client CPU per output token (µs)", f.get("client_cpu_us_per_token"), 1)
        found = self.statistics(metrics, percentiles)
        for name in metrics:
            short, title = METRICS[name]
            lines.append(f"{title:-^50}")
            line(f"Mean {short} (ms)", found[f"mean_{name}_ms"])
            for p in percentiles:
                line(f"P{p:g} {short} (ms)", found[f"p{p:g}_{name}_ms"])
        lines.append("=" * 50)
        return "\n".join(lines)

    def details(self) -> dict[str, Any]:
        """Each request's own figures, failed ones with None."""
        return {
            "input_lens": [o.prompt_tokens for o in self.all],
            "output_lens": [o.output_tokens for o in self.all],
            "ttfts": [None if o.error else o.ttft for o in self.all],
            "itls": [o.gaps for o in self.all],
            "latencies": [None if o.error else o.latency for o in self.all],
            "start_times": [o.sent for o in self.all],
            "generated_texts": ["".join(o.text) for o in self.all],
            "finish_reasons": [o.finish_reason for o in self.all],
            "errors": [o.error for o in self.all],
        }


def _keeps(outcome: Outcome, goodput: dict[str, float]) -> bool:
    values = {
        "ttft": outcome.ttft,
        "tpot": outcome.time_per_token,
        "e2el": outcome.latency,
        "itl": max(outcome.gaps, default=0.0),
    }
    return all(values[name] <= most for name, most in goodput.items())


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    moments = [(o.sent, 1) for o in outcomes] + [(o.times[-1], -1) for o in outcomes]
    at_once = most = 0
    for _, change in sorted(moments):
        at_once += change
        most = max(most, at_once)
    return most
