"""How many engines there are to be, by what they say of their load."""

import asyncio
import time

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.loop import EngineLoop, LocalClient
from deploy.autoscaling import FULL, LOAD, LoadGauge, autoscaling, engines_wanted
from deploy.settings import Settings
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from tests.support.gated import INFO
from tests.support.simulator import SimulatedExecutor
from tests.support.streams import request, submit


def context(loads: list[float], target: int = 2) -> AutoscalingContext:
    engines = [ReplicaID(str(i), DeploymentID("Engine", "manta-engines-0")) for i in range(4)]
    return AutoscalingContext(
        engines[0].deployment_id, "Engine", "manta-engines-0", len(loads), target, engines, 0, 0,
        {LOAD: dict(zip(engines, loads, strict=False))} if loads else {}, {}, 1, 9, {}, 0, 0, 0,
        None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([], 2),  # nobody has said anything yet: as it is
        ([0.0], 1),
        ([0.0, 0.0], 1),
        ([0.5, 0.5], 1),
        ([0.6, 0.5], 2),
        ([1.0, 1.0], 2),
        ([1.25, 1.0], 3),
        ([7.5], 8),
    ],
)  # fmt: skip
def test_so_many_engines_as_have_what_there_is_to_do(loads: list[float], wanted: int) -> None:
    assert engines_wanted(context(loads)) == (wanted, {})


def test_serve_takes_the_policy() -> None:
    config = AutoscalingConfig(**autoscaling((1, 3), 0.0, 2.0))
    assert config.policy.get_policy()(context([0.6, 0.5])) == (2, {})
    assert (config.min_replicas, config.max_replicas, config.downscale_delay_s) == (1, 3, 2.0)


class _SlowExecutor(SimulatedExecutor):
    def run(self, plan):  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        return super().run(plan)


def test_a_gauge_reads_slots_blocks_and_what_waits() -> None:
    config = EngineConfig.from_options(max_num_seqs=4, max_num_batched_tokens=64)
    executor = _SlowExecutor(300, 0, 16, 4, 2048, None)
    engine = Engine(config, executor, executor.load(), executor.reserve(), 2048)
    loop = EngineLoop(engine)

    async def scenario() -> None:
        gauge, client = LoadGauge(loop), LocalClient(loop, INFO)
        loop.start()
        assert gauge.read() == 0.0
        streams = [await submit(client, request(f"{i}", max_tokens=2000)) for i in range(2)]
        while loop.load.running < 2:
            await asyncio.sleep(0.01)
        assert gauge.read() == pytest.approx(0.5 / FULL)  # two of four slots
        # 64 tokens in 10 ms: 6,400 and less a second. Twenty thousand wait for four seconds.
        long = [await submit(client, request(f"w{i}", [3] * 2000, 40)) for i in range(12)]
        await asyncio.sleep(0.7)
        gauge.read()
        await asyncio.sleep(0.7)
        assert 2.0 < gauge.read() < 200.0  # other programs may take of its time
        for stream in streams + long:
            stream.cancel()
        while loop.load.running or loop.load.waiting:
            await asyncio.sleep(0.01)
        assert gauge.read() == 0.0

    try:
        asyncio.run(scenario())
    finally:
        loop.stop()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_replicas": 2}, "min_replicas needs max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas=3 is more than max_replicas=2"),
        ({"num_replicas": 2, "max_replicas": 4}, "max_replicas cannot be given beside it"),
        ({"max_replicas": 0}, "max_replicas"),
    ],
)
def test_contradictions_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings.from_options(options)
