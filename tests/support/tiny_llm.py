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
    """No request and no block is left."""
    engine, kv = llm.engine, llm.engine.scheduler.kv
    assert not engine.has_work and not engine.scheduler.has_work and engine.num_unfinished == 0
    assert kv.device.num_held == kv.cpu.num_held == 0
    kv.device.check()
    kv.cpu.check()
