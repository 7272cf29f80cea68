"""How much of each kind of memory a rank has room for: KV blocks, and states of sequences."""

from collections.abc import Callable, Sequence

from engine.config import CacheConfig
from engine.errors import ConfigError
from workers.layers.memory import Memory
from workers.messages import Units

GIB = 2**30
STATES_SHARE = 0.5  # of the memory, at most


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
    room = device_bytes() if blocks is None else blocks * block
    if states is None:
        # Beside blocks that are given, states take as much memory as they do.
        share = room * STATES_SHARE if blocks is None else room
        states = _count(int(share), state, most_states)
    if blocks is None:
        blocks = _count(room - states * state, block, most_blocks)
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
