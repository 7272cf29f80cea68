"""Which engine a request goes to."""

from collections.abc import Sequence

from cluster.client import EngineClient


class Balancer:
    """Chooses among engines."""

    def choose(self, prompt: Sequence[int], engines: Sequence[EngineClient]) -> EngineClient:
        return min(engines, key=lambda engine: engine.load.waiting + engine.load.running)

    def sent(self, prompt: Sequence[int], engine: EngineClient) -> None:
        """Remember that an engine took a prompt."""
