"""How long requests spend in each stage of the router."""

import contextlib
import time
from bisect import bisect_left
from collections.abc import Iterator

STAGES = ("validate", "template", "tokenize", "queue", "first_token", "stream")
BUCKETS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
    2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


class Stages:
    """Counts of seconds by stage and bucket; the last bucket is without an end."""

    def __init__(self) -> None:
        self.counts = {stage: [0] * (len(BUCKETS) + 1) for stage in STAGES}
        self.sums = dict.fromkeys(STAGES, 0.0)

    def observe(self, stage: str, seconds: float) -> None:
        self.counts[stage][bisect_left(BUCKETS, seconds)] += 1
        self.sums[stage] += seconds

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Observe how long the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.observe(stage, time.perf_counter() - started)
