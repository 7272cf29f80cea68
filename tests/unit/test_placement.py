"""Where workers go, given what the nodes have."""

import pytest

from cluster.placement import Node, describe, fits, place, splits_a_stage


@pytest.mark.parametrize(
    ("need", "have", "count"),
    [
        ({"CPU": 1}, {"CPU": 4}, 4),
        ({"CPU": 0.1}, {"CPU": 1}, 10),
        ({"CPU": 3}, {"CPU": 8}, 2),
        ({"GPU": 1}, {"CPU": 8}, 0),
        ({"GPU": 1, "CPU": 2}, {"GPU": 4, "CPU": 5}, 2),
        ({"GPU": 0.5}, {"GPU": 2}, 4),
        ({"GPU": 0.6}, {"GPU": 2}, 2),  # a worker's share is of one GPU
        ({"GPU": 0.5}, {"GPU": 1.5}, 3),
        ({"CPU": 1}, {"CPU": 0.9999999}, 1),  # as Ray rounds
    ],
)
def test_how_many_fit(need, have, count):
    assert fits(need, have) == count


@pytest.mark.parametrize(
    ("room", "tensor", "pipeline", "nodes"),
    [
        ([8, 8], 2, 2, [0, 0, 0, 0]),  # all on one node, the first of equals
        ([8, 4], 2, 2, [1, 1, 1, 1]),  # the smallest that is large enough
        ([2, 2], 2, 2, [0, 0, 1, 1]),  # a stage on each
        ([3, 3], 2, 2, [0, 0, 1, 1]),  # never half a stage where a whole one fits
        ([1, 2, 4], 2, 3, [2, 2, 2, 2, 1, 1]),  # neighbours together, few nodes
        ([3, 3, 3], 4, 2, [0, 0, 0, 1, 1, 1, 2, 2]),  # no node has room for a stage
        ([1, 1], 1, 3, None),
        ([], 1, 2, None),
    ],
)
def test_placing(room, tensor, pipeline, nodes):
    assert place(room, tensor, pipeline) == nodes


def test_a_split_stage_is_seen():
    assert splits_a_stage([0, 0, 0, 1], 2)
    assert not splits_a_stage([0, 0, 1, 1], 2)


def test_what_the_cluster_has_is_told_by_node():
    nodes = [Node("a", "10.0.0.1", {"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 0.5})]
    nodes.append(Node("b", "10.0.0.2", {"CPU": 8}, {}))
    told = "10.0.0.1: 0.5 of 2 GPU free; 10.0.0.2: 0 of 0 GPU free"
    assert describe(nodes, {"GPU": 1}) == told
    assert describe([], {"GPU": 1}) == "no node"
