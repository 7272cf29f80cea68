"""The copies between the tiers, against a plain model of which block holds what."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.plan import Copies, StateMoves, pairs
from workers import kv
from workers.layers.memory import Memory
from workers.messages import Units

LAYERS, DEVICE_BLOCKS, CPU_BLOCKS = 5, 40, 90


def memory_of(number, device):
    """Layers are not alike: in shape, type, and in how their bytes are aligned."""
    shape, dtype = (2, 500 * number + 3), (torch.float32, torch.float64)[number % 2]
    bytes = 2 * shape[1] * dtype.itemsize
    return Memory(lambda n: torch.empty(n, *shape, dtype=dtype, device=device), bytes)


def check_copies(device, seed, staging_bytes, busy=lambda: None):
    """Steps of random copies out and in, then writes to blocks that were just freed.

    ``busy`` gives the device work in each step, so that copies that did not wait would be seen.
    Nothing is looked at before the end but by the device itself.
    """
    draw = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "STAGING_BYTES", staging_bytes)
        cache = kv.KVCache(
            [memory_of(number, device) for number in range(LAYERS)],
            Units(DEVICE_BLOCKS, CPU_BLOCKS), device,
        )  # fmt: skip
    on_device, on_cpu = [0] * DEVICE_BLOCKS, {}
    for layer in cache.layers:
        layer.zero_()
    seen, expected, number = [], [], 0
    for _ in range(60):
        blocks = draw.sample(range(DEVICE_BLOCKS), draw.randint(1, DEVICE_BLOCKS))
        free = [block for block in range(CPU_BLOCKS) if draw.random() < 0.6]
        out = list(zip(blocks, free, strict=False)) if draw.random() < 0.8 else []
        in_ = []
        known = [c for c in on_cpu if c not in {c for _, c in out}] + [c for _, c in out]
        if known and draw.random() < 0.8:  # into blocks that are copied out in this very step too
            sources = draw.sample(known, min(len(known), draw.randint(1, 30)))
            in_ = list(zip(sources, draw.sample(range(DEVICE_BLOCKS), len(sources)), strict=True))
        on_cpu |= {c: on_device[b] for b, c in out}
        for c, b in in_:
            on_device[b] = on_cpu[c]
        busy()
        cache.copy(Copies(pairs(out), pairs(in_)))
        for block in draw.sample(blocks, draw.randint(0, len(blocks))):
            number += 1
            on_device[block] = number
            for i, layer in enumerate(cache.layers):
                layer[block] = number + 1000.0 * i
        rows = [layer.flatten(1).double() for layer in cache.layers]
        seen.append(torch.stack([row.amin(1) for row in rows]))
        seen.append(torch.stack([row.amax(1) for row in rows]))
        expected += [list(on_device)] * 2
    offsets = 1000.0 * np.arange(LAYERS)[:, None]
    written = np.array(expected, np.float64)[:, None, :]
    # Blocks that nobody wrote hold 0 in every layer.
    np.testing.assert_array_equal(
        torch.stack(seen).cpu().numpy(), np.where(written > 0, written + offsets, 0)
    )
    return cache


@pytest.mark.parametrize("seed", range(4))
def test_blocks_hold_what_was_copied_there(seed):
    cache = check_copies(torch.device("cpu"), seed, 1 << 20)
    seen = cache.copied()
    assert seen.blocks_out > 100 and seen.blocks_in > 100
    assert seen.seconds_out > 0 and seen.seconds_in > 0
    assert cache.copied().blocks_out == 0  # told once
    out, in_ = cache.measure()
    assert 0 < out < 1 and 0 < in_ < 1


def test_states_are_moved_apart_from_blocks():
    """Copies out come first, then those in, then forks, which read before they write; of what no
    state has, a new sequence's is zero. Blocks are left alone."""
    cpu = torch.device("cpu")
    memories = [replace(memory_of(number, cpu), state=number != 1) for number in range(3)]
    cache = kv.KVCache(memories, Units(7, 2, 5, 2), cpu)
    for number, layer in enumerate(cache.layers):
        layer[:] = 100 * number + torch.arange(len(layer)).view(-1, 1, 1)
    forks = pairs([(1, 3), (3, 1), (0, 2), (-1, 4)])
    copies = Copies(out=pairs([(0, 1), (4, 0)]), in_=pairs([(0, 0)]))
    cache.move_states(StateMoves(copies=copies, forks=forks))
    for number, layer in enumerate(cache.layers):
        first = layer.flatten(1)
        assert (first == first[:, :1]).all()
        expected = [4, 3, 4, 1, -100 * number] if number != 1 else range(7)
        assert (first[:, 0] - 100 * number).tolist() == list(expected)
    cache.move_states(StateMoves(copies=Copies(in_=pairs([(1, 4)]))))
    assert cache.layers[2][4].flatten().unique().tolist() == [200]


@pytest.mark.parametrize(
    "blocks, runs",
    [
        ([0], [(0, 1, 0)]),
        ([3, 4, 5, 9, 8, 0, 1], [(0, 3, 3), (3, 1, 9), (4, 1, 8), (5, 2, 0)]),
    ],
)
def test_blocks_that_follow_each_other_are_copied_at_once(blocks, runs):
    assert list(kv._runs(np.array(blocks, np.int32))) == runs
