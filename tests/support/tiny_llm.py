"""``LLM`` on the tiny checkpoints."""

from pathlib import Path
from typing import Any

from manta import LLM


def start_llm(path: Path, tokenizer: Path | None = None, **options: Any) -> LLM:
    """An LLM in float32 on the CPU with little memory; ``options`` come on top."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "swap_space": 0.001,
        "use_tqdm_on_load": False,
    }
    if not {"num_gpu_blocks_override", "gpu_memory_utilization"} & options.keys():
        defaults["kv_cache_memory_bytes"] = 8 << 20
    return LLM(path, **{"tokenizer": tokenizer, **defaults, **options})


def assert_idle(llm: LLM) -> None:
    """No request, no block and no state is left."""
    engine, kv = llm.engine, llm.engine.scheduler.kv
    assert not engine.has_work and not engine.scheduler.has_work and engine.num_unfinished == 0
    pools = [kv.device, kv.cpu]
    if kv.states is not None:
        pools += [kv.states.tiers.device, kv.states.tiers.cpu]
    for pool in pools:
        assert pool.num_held == 0
        pool.check()
