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
        self._config, self._path, self._progress = config, path, progress
        self._worker = Worker(config, path)

    @property
    def steps_ahead(self) -> int:
        """How many steps it pays to plan before a result: a CPU computes in this very thread."""
        return 0

    def load(self) -> ModelFacts:
        return self._worker.load(self._progress)

    def reserve(self) -> Capacity:
        self._units = self._worker.measure()
        return self._worker.reserve(self._units)

    def run(self, plan: StepPlan) -> Pending:
        return self._worker.run(plan)

    def check(self) -> None:
        """It fails only when it runs."""

    def restart(self) -> None:
        """A new worker with as many blocks."""
        del self._worker  # its memory first
        self._worker = Worker(self._config, self._path)
        self._worker.load()
        self._worker.reserve(self._units)

    @property
    def pipelined(self) -> bool:
        """Whether steps in flight must have no sequence in common."""
        return False

    def stop(self) -> None:
        del self._worker
