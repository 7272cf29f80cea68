"""The metrics of an engine or an ingress replica through Ray's own agent, so that a Ray cluster's
Prometheus sees them.

They come there as ``ray_manta_NAME``. All are set, as gauges, to what was counted so
far: counters end in ``_total`` and histograms are their series ``_bucket`` (by ``le``), ``_sum``
and ``_count``, so queries are written as ever and the figures are exact. Ray's own counters and
histograms would have to be told every single observation.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from ray.util.metrics import Gauge

from engine.errors import EngineError
from engine.log import get_logger
from engine.stats import Metric

log = get_logger("metrics")

EVERY = 5.0  # seconds; Ray hands on what it was told every ten
Tags = dict[str, str]


class RayMetrics:
    """Tells Ray's agent in a thread of its own, from ``start`` to ``stop``."""

    def __init__(self, ask: Callable[[], list[Metric]], labels: Mapping[str, str]) -> None:
        self._ask = ask
        self._labels = dict(labels)
        self._gauges: dict[str, Gauge] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-metrics", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; harmless if it has."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(EVERY):
            try:
                self.tell(self._ask())
            except EngineError:  # a long step, or its end
                continue
            except Exception as error:  # the agent's trouble is not the engine's
                log.warning("Ray's agent was not told the metrics: %s", error)

    def tell(self, metrics: list[Metric]) -> None:
        """Set every series."""
        for metric in metrics:
            for name, tags, value in series(metric):
                gauge = self._gauges.get(name)
                if gauge is None:
                    keys = (*self._labels, *tags)
                    gauge = self._gauges[name] = Gauge(name, metric.help, tag_keys=keys)
                gauge.set(value, tags=self._labels | tags)


def series(metric: Metric) -> Iterator[tuple[str, Tags, float]]:
    """(name, tags, value) of all that a metric is to Prometheus."""
    name = f"manta_{metric.name}"
    for sample in metric.samples:
        tags = dict(zip(metric.labels, sample.labels, strict=True))
        if metric.kind == "histogram":
            bounds = [*(f"{float(bound)!r}" for bound in metric.bounds), "+Inf"]
            counts = list(accumulate(sample.counts))
            for bound, count in zip(bounds, counts, strict=True):
                yield f"{name}_bucket", tags | {"le": bound}, count
            yield f"{name}_sum", tags, sample.value
            yield f"{name}_count", tags, counts[-1]
        else:
            yield name + ("_total" if metric.kind == "counter" else ""), tags, sample.value
