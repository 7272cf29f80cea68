"""GET /metrics: the whole application's metrics as Prometheus text, in one scrape.

Names are vLLM's under ``manta:`` with its labels, so that its dashboards carry over; or, where they
are asked for, the same as Prometheus' own rules want them. An engine's series have its id as the
label ``engine``; an ingress process's have ``ingress``.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from cluster.client import EngineClient
from engine.errors import EngineError
from engine.stats import Metric, Sample

# By what ``names`` may be. Prometheus keeps the colon for recording rules, and the ending _total,
# which one histogram of vLLM's has, for counters.
PREFIXES = {"vllm": "manta:", "prometheus": "manta_"}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PATIENCE = 2.0  # seconds for an engine to answer; one that does not is left out

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
Labels = Mapping[str, str]
Sources = list[tuple[Labels, list[Metric]]]


async def collect(engines: Sequence[EngineClient], ingress: Mapping[str, list[Metric]]) -> Sources:
    """The metrics of engines, asked now, and of ingress processes by their ids, with the labels of
    each."""
    counted = await asyncio.gather(*map(_ask, engines))
    sources: Sources = [
        ({"model_name": engine.info.names[0], "engine": engine.info.engine_id}, metrics)
        for engine, metrics in zip(engines, counted, strict=True)
    ]
    return sources + [({"ingress": id}, metrics) for id, metrics in sorted(ingress.items())]


async def _ask(engine: EngineClient) -> list[Metric]:
    """What an engine has counted; nothing if it does not answer."""
    try:
        return await asyncio.wait_for(engine.stats(), PATIENCE)
    except (EngineError, TimeoutError):
        return []


def render(sources: Iterable[tuple[Labels, list[Metric]]], names: str) -> bytes:
    """Prometheus text of several sources' metrics, each with labels of its own.

    names: a key of ``PREFIXES``.
    """
    families: dict[str, Family] = {}
    for labels, metrics in sources:
        for metric in metrics:
            family = families.get(metric.name)
            if family is None:
                family = families[metric.name] = _family(metric, [*labels, *metric.labels], names)
            for sample in metric.samples:
                _add(family, [*labels.values(), *sample.labels], metric, sample)
    return generate_latest(_Families(families.values()))


def _family(metric: Metric, labels: list[str], names: str) -> Family:
    name = PREFIXES[names] + metric.name
    if metric.kind == "counter":
        return CounterMetricFamily(name, metric.help, labels=labels)
    if names == "prometheus":
        name = name.removesuffix("_total")
    if metric.kind == "gauge":
        return GaugeMetricFamily(name, metric.help, labels=labels)
    return HistogramMetricFamily(name, metric.help, labels=labels)


def _add(family: Family, labels: list[str], metric: Metric, sample: Sample) -> None:
    if isinstance(family, HistogramMetricFamily):
        bounds = [*map(_bound, metric.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(sample.counts), strict=True))
        family.add_metric(labels, buckets, sample.value)
    else:
        family.add_metric(labels, sample.value)


def _bound(bound: float) -> str:
    return repr(float(bound))


class _Families(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Family]:
        return iter(self._families)
