"""What an ingress process knows of the engines."""

from collections import Counter
from collections.abc import Collection, Iterator

from cluster.client import EngineClient
from engine.stats import Metric, Sample
from router.shapes import EngineState

STATES = ("healthy", "recovering", "draining", "unhealthy")


def engines_by_id(engines: Collection[EngineClient]) -> Iterator[EngineClient]:
    """The engines, always in the same order."""
    return iter(sorted(engines, key=lambda engine: engine.info.engine_id))


def engine_states(engines: Collection[EngineClient]) -> list[EngineState]:
    """Each engine's state."""
    return [
        EngineState(
            engine_id=engine.info.engine_id,
            model=engine.info.names[0],
            healthy=engine.healthy,
            draining=engine.load.draining,
            recovering=engine.load.recovering,
            running=engine.load.running,
            waiting=engine.load.waiting,
            waiting_tokens=engine.load.waiting_tokens,
            free_blocks=engine.load.free_blocks,
            blocks=engine.info.num_device_blocks,
        )
        for engine in engines_by_id(engines)
    ]


def _state(engine: EngineClient) -> str:
    if not engine.healthy:
        return "unhealthy"
    if engine.load.draining:
        return "draining"
    return "recovering" if engine.load.recovering else "healthy"


def engines_metric(engines: Collection[EngineClient], models: Collection[str]) -> Metric:
    """How many engines of each model are in each state, also of those ``models`` that have none.
    Where there is no model either, a series without one says so."""
    found = Counter((engine.info.names[0], _state(engine)) for engine in engines)
    names = sorted({*models, *(name for name, _ in found)}) or [""]
    samples = tuple(Sample((name, state), found[name, state]) for name in names for state in STATES)
    labels = ("model_name", "state")
    return Metric("engines", "gauge", "Engines that are known, by state.", labels, samples)
