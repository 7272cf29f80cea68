"""Which node each worker goes to: pure arithmetic on what the nodes have.

Everything on one node if it fits; else each pipeline stage whole on one node, neighbouring stages
together, on as few nodes as will do; else, at a price, the ranks of a stage on several nodes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_EPSILON = 1e-6


@dataclass(frozen=True)
class Node:
    """A node of the cluster: all its resources, and those that nobody holds now."""

    id: str
    host: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def fits(need: Mapping[str, float], have: Mapping[str, float]) -> int:
    """How many workers that ``need`` so much find room in ``have``; a GPU's share is of one GPU."""
    counts = []
    for name, amount in need.items():
        there = have.get(name, 0.0) + _EPSILON
        if name == "GPU" and amount < 1:
            each = math.floor(1 / amount + _EPSILON)
            whole = math.floor(there)
            counts.append(whole * each + math.floor((there - whole) / amount + _EPSILON))
        else:
            counts.append(math.floor(there / amount))
    return min(counts)


def place(room: Sequence[int], tensor: int, pipeline: int) -> list[int] | None:
    """The node of each rank, numbered stage by stage; None if there is no room.

    ``room[i]`` is how many workers fit on node i; of nodes that are equally good the first is
    taken.
    """
    world = tensor * pipeline
    order = sorted(range(len(room)), key=lambda i: room[i])
    for node in order:  # the smallest that is large enough
        if room[node] >= world:
            return [node] * world
    largest_first = sorted(range(len(room)), key=lambda i: -room[i])
    whole = [node for node in largest_first for _ in range(room[node] // tensor)]
    if len(whole) >= pipeline:
        return [node for node in whole[:pipeline] for _ in range(tensor)]
    single = [node for node in largest_first for _ in range(room[node])]
    return single[:world] if len(single) >= world else None


def splits_a_stage(nodes: Sequence[int], tensor: int) -> bool:
    """Whether some stage's ranks are on several nodes."""
    stages = (nodes[i : i + tensor] for i in range(0, len(nodes), tensor))
    return any(len(set(stage)) > 1 for stage in stages)


def describe(nodes: Sequence[Node], need: Mapping[str, float]) -> str:
    """What the cluster has of what is needed, node by node."""
    parts = []
    for node in nodes:
        amounts = ", ".join(
            f"{node.free.get(name, 0.0):g} of {node.total.get(name, 0.0):g} {name} free"
            for name in need
        )
        parts.append(f"{node.host}: {amounts}")
    return "; ".join(parts) if parts else "no node"
