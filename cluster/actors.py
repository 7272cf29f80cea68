"""The ranks of a replica as Ray actors, in one placement group. Ray starts, places and watches;
plans and results travel beside it."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from cluster.joining import connect_ray, own_host
from cluster.placement import Node, describe, fits, place, splits_a_stage
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError
from engine.log import get_logger, waiting_for
from workers.rank import Call, serve

log = get_logger("actors")

_START_TIMEOUT = 180.0  # seconds in which processes that have been placed must answer
_GONE_TIMEOUT = 10.0  # seconds in which a placement group that is removed must be gone


class RankActor:
    """The process of one rank."""

    def pid(self) -> tuple[str, int]:
        """(node id, process id)."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def serve(self, rank: int, call: Call, cpus: float | None) -> None:
        """Be a rank until told to stop; raises what made it fail."""
        serve(rank, own_host(), call, cpus)


def cluster_nodes() -> list[Node]:
    """The nodes that are alive, this process's first."""
    free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    here = ray.get_runtime_context().get_node_id()
    nodes = [
        Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"], free.get(n["NodeID"], {}))
        for n in ray.nodes()  # type: ignore[no-untyped-call]
        if n["Alive"]
    ]
    return sorted(nodes, key=lambda node: node.id != here)


class RayLauncher:
    """See ``Launcher``."""

    def __init__(self, config: EngineConfig) -> None:
        connect_ray()
        self._parallel = parallel = config.parallel
        self.host = own_host()
        self.device = config.device.device
        if self.device == "auto":
            gpus = ray.cluster_resources().get("GPU")  # type: ignore[no-untyped-call]
            self.device = "cuda" if gpus else "cpu"
        if self.device == "cuda":
            self._need = {"GPU": parallel.worker_gpus}
            if parallel.worker_cpus is not None:
                self._need["CPU"] = parallel.worker_cpus
        else:
            self._need = {"CPU": 1.0 if parallel.worker_cpus is None else parallel.worker_cpus}
        self._own = {} if parallel.worker_resource is None else {parallel.worker_resource: 1.0}
        self._need |= self._own
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []  # handles of RankActor
        self._pids: list[tuple[str, int]] = []
        self._serving: list[ray.ObjectRef[None]] = []

    # ---- placing ----

    def start(self, call: Call) -> None:
        with waiting_for(log, "room for the workers in the cluster"):
            self._group = self._place()
        actor = ray.remote(RankActor)
        for rank in range(self._parallel.world_size):
            self._actors.append(
                actor.options(
                    num_cpus=self._need.get("CPU", 0),
                    num_gpus=self._need.get("GPU", 0),
                    resources=self._own,
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        self._group, placement_group_bundle_index=rank
                    ),
                ).remote()
            )
        pids = [a.pid.remote() for a in self._actors]
        self._serving = [
            a.serve.remote(rank, call, self._parallel.worker_cpus)
            for rank, a in enumerate(self._actors)
        ]
        try:
            self._pids = ray.get(pids, timeout=_START_TIMEOUT)
        except RayError as error:
            raise EngineError(f"a worker failed to start: {error}") from error

    def _place(self) -> PlacementGroup:
        """A placement group with a bundle for each rank, ready."""
        deadline = time.monotonic() + self._parallel.placement_timeout
        while True:
            nodes = cluster_nodes()
            ids = self._choose(nodes, deadline)
            if ids is not None:
                group: PlacementGroup = placement_group(
                    [self._need] * len(ids),
                    strategy="PACK",
                    bundle_label_selector=[{"ray.io/node-id": node} for node in ids],
                )
                if group.wait(max(1.0, min(5.0, deadline - time.monotonic()))):
                    return group
                _remove(group)  # someone else took the room
            time.sleep(0.1)

    def _choose(self, nodes: list[Node], deadline: float) -> list[str] | None:
        """The node of each rank; None if there is no room now but may be later.

        Raises ConfigError if there never is, EngineError after the deadline.
        """
        parallel = self._parallel
        tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        asked = (
            f"tensor_parallel_size={tensor} × pipeline_parallel_size={pipeline} asks for"
            f" {tensor * pipeline} workers of {_amounts(self._need)} each"
        )
        if place([fits(self._need, node.total) for node in nodes], tensor, pipeline) is None:
            raise ConfigError(
                f"{asked}; the cluster never has that: {describe(nodes, self._need)}"
                " (worker_cpus, worker_gpus and worker_resource say what a worker asks for)"
            )
        chosen = place([fits(self._need, node.free) for node in nodes], tensor, pipeline)
        if chosen is None:
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"{asked}; there was no room within placement_timeout"
                    f" ({self._parallel.placement_timeout:g} s): {describe(nodes, self._need)}"
                )
            return None
        if splits_a_stage(chosen, tensor):
            log.warning("No node has room for a whole stage: its ranks talk over the network")
        return [nodes[i].id for i in chosen]

    # ---- watching ----

    def ended(self, patience: float = 0.0) -> dict[int, str]:
        if not self._serving:
            return {}
        ray.wait(self._serving, num_returns=1, timeout=patience)
        done, _ = ray.wait(self._serving, num_returns=len(self._serving), timeout=0)
        ended = {}
        for rank, ref in enumerate(self._serving):
            if ref in done:
                try:
                    ray.get(ref)
                    ended[rank] = "it returned"
                except RayTaskError as error:
                    ended[rank] = str(error)
                except RayActorError as error:
                    ended[rank] = _reason(str(error))
        return ended

    # ---- ending ----

    def kill(self, ranks: Sequence[int], hard: bool) -> None:
        if not ray.is_initialized():
            return  # Ray has ended them
        for rank in ranks:
            # Ray's kill is a request that a stopped process never sees.
            if hard and rank < len(self._pids):
                _kill_on(*self._pids[rank])
            elif not hard and rank < len(self._actors):
                ray.kill(self._actors[rank])

    def release(self) -> None:
        self.kill(range(len(self._actors)), hard=False)  # an actor outlives the call that it served
        if self._group is not None and ray.is_initialized():
            _remove(self._group)
        self._actors, self._serving, self._pids, self._group = [], [], [], None


def _kill_on(node: str, pid: int) -> None:
    """End a process of a node: at once on this one, on another by a task there."""
    if node == ray.get_runtime_context().get_node_id():
        _kill(pid)
    else:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _remove(group: PlacementGroup) -> None:
    remove_placement_group(group)
    deadline = time.monotonic() + _GONE_TIMEOUT
    while time.monotonic() < deadline:
        if placement_group_table(group).get("state") == "REMOVED":
            return
        time.sleep(0.01)


def _amounts(need: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in need.items())


def _reason(text: str) -> str:
    """What Ray says of an actor's death, without the identifiers and guesses around it."""
    lines = [line.strip() for line in text.splitlines() if "because" in line]
    return lines[0].split(". ")[0].rstrip(".") if lines else "its process ended"
