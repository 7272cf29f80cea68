"""Writes the alert rules of deploy/grafana for Prometheus: python tools/alerts.py

They are there twice: for names as manta's own /metrics has them, and as Ray's agents do.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "grafana"
FILES = {"alerts.yml": "manta:", "alerts-ray.yml": "ray_manta_"}
HEAD = """\
# Alert rules for Prometheus, written by tools/alerts.py. The numbers after the last comparison are
# objectives: change them to yours.
"""
EACH = "sum by (model_name, engine)"


@dataclass(frozen=True)
class Alert:
    """One rule. ``@name`` is a metric of manta's; ``value`` is compared last, with ``limit``."""

    name: str
    value: str
    limit: str
    lasts: str
    severity: str
    says: str


def p99(name: str) -> str:
    """The 99th percentile of a histogram in five minutes, by model."""
    return f"histogram_quantile(0.99, sum by (le, model_name) (rate(@{name}_bucket[5m])))"


ALERTS = (
    Alert(
        "MantaGone", "absent(@engines)", "== 1", "1m", "critical",
        "Prometheus finds no server.",
    ),
    Alert(
        # One that drains: what Ray's agents tell last of a model that was removed.
        "MantaNoEngine", 'max by (model_name) (@engines{state=~"healthy|draining"})', "== 0", "1m",
        "critical",
        "No engine {{ with $labels.model_name }}of {{ . }} {{ end }}makes progress: requests get"
        " 503.",
    ),
    Alert(
        "MantaEngineUnhealthy", 'max by (model_name) (@engines{state="unhealthy"})', "> 0", "1m",
        "warning",
        "{{ $value }} engines of {{ $labels.model_name }} do not answer, or their step hangs.",
    ),
    Alert(
        "MantaNoProgress",
        f"{EACH} (@num_requests_running) * on (model_name, engine)"
        f" ({EACH} (rate(@steps_total[1m])) == bool 0)",
        "> 0", "1m", "critical",
        "Engine {{ $labels.engine }} has {{ $value }} sequences and runs no step.",
    ),
    Alert(
        "MantaQueueGrowing", "sum by (model_name) (deriv(@num_requests_waiting[10m]))",
        "> 0.1", "10m", "warning",
        "The queue of {{ $labels.model_name }} grows by {{ $value | humanize }} a second.",
    ),
    Alert(
        "MantaFailovers",
        'sum by (model_name, cause) (increase(@requests_moved_total{cause!="drained"}[10m]))',
        "> 0", "0m", "warning",
        "{{ $value | humanize }} requests for {{ $labels.model_name }} had to go on with another"
        " engine: {{ $labels.cause }}.",
    ),
    Alert(
        "MantaKvPressure", f"{EACH} (rate(@num_preemptions_total[5m]))", "> 0.1", "10m", "warning",
        "Engine {{ $labels.engine }} sets {{ $value | humanize }} requests aside a second: its KV"
        " blocks are too few for --max-num-seqs.",
    ),
    Alert(
        "MantaErrors",
        '(sum(rate(@http_requests_total{status=~"5.."}[5m])) or vector(0))'
        " / sum(rate(@http_requests_total[5m]))",
        "> 0.05", "5m", "critical",
        "{{ $value | humanizePercentage }} of the answers are 5xx.",
    ),
    Alert(
        "MantaRefusing",
        '(sum(rate(@http_requests_total{status="429"}[5m])) or vector(0))'
        " / sum(rate(@http_requests_total[5m]))",
        "> 0.2", "10m", "warning",
        "{{ $value | humanizePercentage }} of the answers are 429: the queues are full.",
    ),
    Alert(
        "MantaSlowTokens", p99("inter_token_latency_seconds"), "> 0.25", "10m", "warning",
        "One token in a hundred of {{ $labels.model_name }} takes {{ $value | humanizeDuration }}.",
    ),
    Alert(
        "MantaSlowFirstToken", p99("time_to_first_token_seconds"), "> 10", "10m", "warning",
        "One request in a hundred to {{ $labels.model_name }} waits {{ $value | humanizeDuration }}"
        " for its first token.",
    ),
)  # fmt: skip


def rules(prefix: str) -> str:
    """The file of rules for metrics with a prefix."""
    made = [
        {
            "alert": alert.name,
            "expr": f"{alert.value} {alert.limit}".replace("@", prefix),
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.says},
        }
        for alert in ALERTS
    ]
    groups = {"groups": [{"name": "manta", "rules": made}]}
    return HEAD + str(yaml.safe_dump(groups, sort_keys=False, width=100))


def main() -> None:
    """Write them all."""
    for name, prefix in FILES.items():
        (FOLDER / name).write_text(rules(prefix))


if __name__ == "__main__":
    main()
