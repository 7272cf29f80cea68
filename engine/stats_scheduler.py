"""What a scheduler and its blocks have counted, and what they hold now, as metrics."""

from engine.config import CacheConfig
from engine.executor import Capacity
from engine.scheduler import Scheduler
from engine.states import States
from engine.stats import Metric, Sample, counter, gauge


def scheduler_metrics(scheduler: Scheduler, capacity: Capacity) -> list[Metric]:
    """Read when someone asks; nothing of it costs the loop anything."""
    stats, kv = scheduler.stats, scheduler.kv
    waiting, block = scheduler.num_waiting, capacity.block_bytes
    kinds = dict.fromkeys((("swap", "0"), ("recompute", "0")), 0) | stats.preempted
    states = [] if kv.states is None else _state_metrics(kv.states)
    return [
        *states,
        gauge("num_requests_running", "Sequences that run.", scheduler.num_running),
        gauge("num_requests_waiting", "Sequences that wait.", waiting),
        Metric(
            "num_requests_waiting_by_reason",
            "gauge",
            "Sequences that wait, by reason; nothing is deferred today.",
            ("reason",),
            (Sample(("capacity",), waiting), Sample(("deferred",), 0)),
        ),
        gauge(
            "kv_cache_usage_perc",
            "Device KV blocks that are held; 1 is all of them.",
            kv.device.num_held / max(1, kv.device.num_blocks),
        ),
        gauge("kv_blocks", "Device KV blocks.", kv.device.num_blocks),
        gauge("kv_blocks_used", "Device KV blocks that are held.", kv.device.num_held),
        gauge("cpu_kv_blocks", "CPU KV blocks.", kv.cpu.num_blocks),
        gauge("cpu_kv_blocks_used", "CPU KV blocks that are held.", kv.cpu.num_held),
        counter("prefix_cache_queries", "Tokens looked up in the cache.", kv.stats.prefix_queries),
        counter("prefix_cache_hits", "Tokens found in the cache.", kv.stats.prefix_hits),
        counter(
            "num_preemptions", "Preemptions.", stats.preemptions_swap + stats.preemptions_recompute
        ),
        Metric(
            "preemptions_by_kind",
            "counter",
            "Preemptions, by kind and by the priority of who was preempted.",
            ("kind", "priority"),
            tuple(Sample(labels, count) for labels, count in kinds.items()),
        ),
        counter(
            "recomputed_tokens",
            "Tokens computed again after a preemption.",
            stats.recomputed_tokens,
        ),
        counter(
            "moved_tokens",
            "Tokens computed again because an engine or its workers were lost, or left.",
            stats.moved_tokens,
        ),
        counter(
            "swapped_out_bytes",
            "KV bytes copied to CPU blocks for preempted sequences.",
            kv.stats.swapped_out_blocks * block,
        ),
        counter(
            "swapped_in_bytes",
            "KV bytes copied back for them.",
            kv.stats.swapped_in_blocks * block,
        ),
        counter("demoted_blocks", "Cached blocks moved to CPU blocks.", kv.stats.demoted_blocks),
        counter("promoted_blocks", "Cached blocks moved back from them.", kv.stats.promoted_blocks),
        counter("steps", "Steps planned.", stats.steps),
    ]


def _state_metrics(states: States) -> list[Metric]:
    """Of a model with recurrent layers."""
    device, cpu = states.tiers.device, states.tiers.cpu
    return [
        gauge("states", "States of sequences on the device.", device.num_blocks),
        gauge("states_used", "States on the device that are held.", device.num_held),
        gauge("cpu_states", "States in CPU memory.", cpu.num_blocks),
        gauge("cpu_states_used", "States in CPU memory that are held.", cpu.num_held),
        counter("kept_states", "States kept for the prefix cache.", states.kept),
    ]


def cache_metric(config: CacheConfig, capacity: Capacity, max_model_len: int) -> Metric:
    """How the KV cache was set up, in the labels of a gauge that is 1, as vLLM has it: among them
    the tokens that the device's blocks hold, and how many requests of the greatest length."""
    tokens = capacity.num_device_blocks * capacity.block_size
    facts = {
        "block_size": capacity.block_size,
        "cache_dtype": capacity.kv_cache_dtype,
        "num_gpu_blocks": capacity.num_device_blocks,
        "num_cpu_blocks": capacity.num_cpu_blocks,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "swap_space": config.swap_space,
        "kv_cache_size_tokens": tokens,
        "kv_cache_max_concurrency": round(tokens / max_model_len, 2),
    }
    sample = Sample(tuple(map(str, facts.values())), 1)
    return Metric(
        "cache_config_info", "gauge", "How the KV cache was set up.", tuple(facts), (sample,)
    )


def invariance_metric(batch_invariant: bool) -> Metric:
    """Whether a request's tokens are the same whatever shares its batch."""
    return Metric(
        "batch_invariant",
        "gauge",
        "1 if a request's tokens do not depend on what shares its batch.",
        (),
        (Sample((), int(batch_invariant)),),
    )
