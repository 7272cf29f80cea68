"""The executor in process: one worker on a CPU, no actor hop."""

from pathlib import Path

from engine.config import EngineConfig
from engine.executor import Capacity, ModelFacts
from engine.plan import StepPlan
from workers.weights import Progress
from workers.worker import Pending, Worker


class LocalExecutor:
    """Runs plans on a worker in this process and thread."""

    def __init__(self, config: EngineConfig, path: Path, progress: Progress | None = None) -> None:
        self._worker = Worker(config, path)
        self._progress = progress

    @property
    def steps_ahead(self) -> int:
        """How many steps it pays to plan before a result: a CPU computes in this very thread."""
        return 0

    def load(self) -> ModelFacts:
        return self._worker.load(self._progress)

    def reserve(self) -> Capacity:
        return self._worker.reserve(self._worker.measure())

    def run(self, plan: StepPlan) -> Pending:
        return self._worker.run(plan)

    def check(self) -> None:
        """It fails only when it runs."""

    @property
    def pipelined(self) -> bool:
        """Whether steps in flight must have no sequence in common."""
        return False

    def stop(self) -> None:
        del self._worker
