"""How much of each kind of memory a rank has room for: KV blocks, and states of sequences."""

from collections.abc import Callable, Sequence

from engine.config import CacheConfig
from engine.errors import ConfigError
from workers.layers.memory import Memory
from workers.messages import Units

GIB = 2**30
STATES_SHARE = 0.5  # of the memory, at most


def check(cache: CacheConfig, recurrent: bool, block_size: int) -> None:
    """Raise ConfigError for an option of states that the model has none for, or that does not fit
    its blocks."""
    interval = cache.mamba_block_size
    given = {"num_mamba_states": cache.num_mamba_states, "mamba_block_size": interval}
    for name, value in given.items():
        if value is not None and not recurrent:
            raise ConfigError(f"{name}={value}: the model has no recurrent layers")
    if interval is not None and interval % block_size:
        raise ConfigError(
            f"mamba_block_size must be a multiple of block_size ({block_size}), got {interval}"
        )


def unit_bytes(memories: Sequence[Memory], state: bool) -> int:
    """Bytes of one block, or of one state, in all of these layers."""
    return sum(memory.unit_bytes for memory in memories if memory.state == state)


def fit(
    cache: CacheConfig,
    memories: Sequence[Memory],
    device_bytes: Callable[[], int],
    most_blocks: int,
    most_states: int,
) -> Units:
    """The units of each tier that there is room for. ``most_blocks`` and ``most_states`` are as
    many as could be of use; without recurrent layers, on any rank, there are no states.

    Raises ConfigError if there is no room for one on the device.
    """
    block, state = unit_bytes(memories, False), unit_bytes(memories, True)
    states, blocks = cache.num_mamba_states, cache.num_gpu_blocks_override
    if not most_states:
        states = 0
    if blocks is None:
        room = device_bytes()
        if states is None:
            states = _count(int(room * STATES_SHARE), state, most_states)
        blocks = _count(room - states * state, block, most_blocks)
    elif states is None:  # as much memory as the blocks take, where there are any
        states = _count(blocks * block, state if block else 0, most_states)
    if blocks < 1 or (most_states and states < 1):
        what, where = (
            ("KV blocks and states", " or num_mamba_states") if state else ("KV blocks", "")
        )
        raise ConfigError(
            f"gpu_memory_utilization leaves no memory for {what}; raise it, or set"
            f" kv_cache_memory_bytes{where}"
        )
    cpu_bytes = int(cache.swap_space * GIB)
    cpu_states = 0
    if most_states:
        cpu_states = _count(int(cpu_bytes * STATES_SHARE), state, most_states)
    cpu_blocks = (cpu_bytes - cpu_states * state) // block if block else most_blocks
    return Units(blocks, cpu_blocks, states, cpu_states)


def _count(room: int, unit: int, most: int) -> int:
    """How many units of so many bytes there is room for; on a rank without such layers, any."""
    return min(most, room // unit) if unit else most
