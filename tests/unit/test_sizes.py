"""How many blocks and states there are, by what is asked for and what there is."""

import pytest
import torch

from engine.config import CacheConfig
from engine.errors import ConfigError
from workers.layers.memory import Memory
from workers.messages import Units
from workers.sizes import GIB, check, fit

BLOCK = Memory(lambda n: torch.empty(n, 100), 100)
STATE = Memory(lambda n: torch.empty(n, 1000), 1000, state=True)
HYBRID = [STATE, BLOCK, STATE, BLOCK]  # 200 bytes a block, 2000 a state


def sizes(memories, room=100_000, most_states=40, swap=0, **options):
    cache = CacheConfig(swap_space=swap / GIB, **options)
    return fit(cache, memories, lambda: room, 10_000, most_states)


def test_states_take_half_of_the_memory_at_most():
    assert sizes(HYBRID) == Units(250, 0, 25, 0)
    assert sizes(HYBRID, most_states=10) == Units(400, 0, 10, 0)
    assert sizes(HYBRID, num_mamba_states=45) == Units(50, 0, 45, 0)
    assert sizes(HYBRID, num_gpu_blocks_override=100) == Units(100, 0, 10, 0)
    assert sizes(HYBRID, num_gpu_blocks_override=7, num_mamba_states=3) == Units(7, 0, 3, 0)
    assert sizes(HYBRID, swap=16_000) == Units(250, 40, 25, 4)
    assert sizes([BLOCK], most_states=0, swap=1000) == Units(1000, 10, 0, 0)


def test_a_stage_of_a_pipeline_without_a_kind_leaves_its_number_to_the_others():
    assert sizes([BLOCK], swap=1000) == Units(1000, 10, 40, 40)
    assert sizes([STATE], swap=6000) == Units(10_000, 10_000, 40, 3)
    assert sizes([STATE], num_gpu_blocks_override=14) == Units(14, 10_000, 40, 0)


def test_too_little_memory_is_refused():
    for room, options in ((1000, {}), (100_000, {"num_mamba_states": 50})):
        with pytest.raises(ConfigError, match="no memory for KV blocks and states; .* or num_mam"):
            sizes(HYBRID, room, **options)
    with pytest.raises(ConfigError, match="no memory for KV blocks; raise it, or set kv_cache_mem"):
        sizes([BLOCK], 99, most_states=0)


def test_options_of_states_are_for_models_that_have_them():
    check(CacheConfig(), False, 16)
    check(CacheConfig(num_mamba_states=5, mamba_block_size=64), True, 32)
    with pytest.raises(ConfigError, match="num_mamba_states=5: the model has no recurrent layers"):
        check(CacheConfig(num_mamba_states=5), False, 16)
    with pytest.raises(ConfigError, match="mamba_block_size=64: the model has no recurrent layers"):
        check(CacheConfig(mamba_block_size=64), False, 16)
    with pytest.raises(ConfigError, match=r"must be a multiple of block_size \(16\), got 24"):
        check(CacheConfig(mamba_block_size=24), True, 16)
