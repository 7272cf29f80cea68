"""The number of engines by their own load: Serve's autoscaler sees no request of theirs.

Each engine says how much of it is taken, and Serve runs ``engines_wanted`` over what all say.
"""

import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Serve's controller, which imports this, needs no engine
    from cluster.loop import EngineLoop

FULL = 0.8  # the share of its slots, or blocks, from which an engine had better have help
QUEUE_SECONDS = 2.0  # of work that waits: as much as another engine is worth
LOOK_BACK = 5.0  # seconds over which what engines say is averaged
REPORT_EVERY = 1.0  # seconds
LOAD = "manta_load"  # the name of what engines say
_LEAST_RATE_SECONDS = 0.5  # over which the speed of an engine is measured, at least


class LoadGauge:
    """How much of an engine its requests take: 1 is as much as it should have."""

    def __init__(self, loop: "EngineLoop") -> None:
        self._loop = loop
        self._rate: float | None = None  # tokens that it computed in a second, with a queue
        self._since = time.monotonic()
        self._tokens = self._computed()

    def read(self) -> float:
        """The share of its slots or blocks that is taken, and on top of that what waits: prompts'
        tokens, in the seconds that the engine needs for them."""
        scheduler, load = self._loop.engine.scheduler, self._loop.load
        blocks = scheduler.kv.device.num_blocks
        taken = max(load.running / scheduler.config.max_num_seqs, 1 - load.free_blocks / blocks)
        return taken / FULL + self._queue_seconds(load.waiting_tokens) / QUEUE_SECONDS

    def _queue_seconds(self, waiting_tokens: int) -> float:
        now, tokens = time.monotonic(), self._computed()
        if not waiting_tokens:
            self._since, self._tokens = now, tokens
            return 0.0
        if now - self._since >= _LEAST_RATE_SECONDS:
            self._rate = (tokens - self._tokens) / (now - self._since)
            self._since, self._tokens = now, tokens
        # One that has computed nothing yet cannot say: it is worth a look, not a new engine each.
        return QUEUE_SECONDS if not self._rate else waiting_tokens / self._rate

    def _computed(self) -> int:
        return self._loop.engine.scheduler.stats.planned_tokens


def autoscaling(
    bounds: tuple[int, int], upscale_delay: float, downscale_delay: float
) -> dict[str, Any]:
    """Serve's ``autoscaling_config`` for so few and so many engines."""
    return {
        "min_replicas": bounds[0],
        "max_replicas": bounds[1],
        "upscale_delay_s": upscale_delay,
        "downscale_delay_s": downscale_delay,
        "look_back_period_s": LOOK_BACK,
        "metrics_interval_s": REPORT_EVERY,
        "policy": {"policy_function": f"{__name__}:engines_wanted"},
    }


def engines_wanted(context: Any) -> tuple[int, dict[str, Any]]:
    """As many engines as have what there is to do; Serve's controller calls it, and keeps to the
    bounds and delays. ``context`` is Serve's AutoscalingContext."""
    loads = context.aggregated_metrics.get(LOAD, {})
    if not loads:
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(loads.values()))), {}
