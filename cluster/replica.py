"""Starting a replica: an executor that is loaded and reserved, and the engine on it."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.client import EngineInfo
from cluster.executor import ParallelExecutor
from cluster.launch import Launcher, ProcessLauncher
from cluster.progress import LoadBar
from cluster.recording import recorded
from engine.config import EMBEDDED_MODEL, EngineConfig, with_gpu_defaults
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError, RequestError
from engine.executor import Capacity
from engine.log import get_logger
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from workers.checkpoint import GenerationConfig, load_config, load_generation_config, resolve
from workers.local import LocalExecutor
from workers.tensor_files import find_files
from workers.worker import check_split, choose_device

log = get_logger("replica")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found, before anything of it is loaded."""

    path: Path
    generation: GenerationConfig
    weight_bytes: int  # of its weight files; 0 for dummy weights


def engine_config(**options: Any) -> EngineConfig:
    """An engine's config from flat options, with the defaults of the device that is there.

    Raises ConfigError as ``EngineConfig.from_options`` does.
    """
    config = EngineConfig.from_options(**options)
    if choose_device(config.device.device).type == "cuda":
        return EngineConfig.from_options(**with_gpu_defaults(options))
    return config


def open_checkpoint(config: EngineConfig) -> Checkpoint:
    """Find the model and read what it says of generation. Raises CheckpointError."""
    options = config.model
    path = resolve(options.model, options.revision, options.load_format)
    generation = load_generation_config(path, load_config(path))
    files = [] if options.load_format == "dummy" else find_files(path, options.load_format)
    return Checkpoint(path, generation, sum(file.stat().st_size for file in files))


def default_sampling(checkpoint: Checkpoint) -> SamplingParams:
    """What generation_config.json recommends, vLLM's defaults for the rest, as vLLM has it.

    Raises CheckpointError for a value that no request could have.
    """
    values = dict(checkpoint.generation.defaults)
    values.pop("do_sample", None)  # temperature says it
    if "max_new_tokens" in values:
        values["max_tokens"] = values.pop("max_new_tokens")
    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise CheckpointError(f"{checkpoint.path}/generation_config.json: {error}") from error


def start_replica(
    config: EngineConfig,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    launcher: Launcher | None = None,
) -> Engine:
    """Load the model, reserve its KV blocks, and say what was done.

    ``launcher`` starts the workers, if there are several; by default what the options say.
    The end tokens are generation_config.json's and the tokenizer's.
    Raises CheckpointError or ConfigError.
    """
    started = time.perf_counter()
    if config.parallel.world_size > 1:
        check_split(config, checkpoint.path)
    with LoadBar(checkpoint.weight_bytes, config.log.use_tqdm_on_load) as bar:
        executor = _make_executor(config, checkpoint, bar, launcher)
        facts = executor.load()
    log.info(
        "Loaded %s (%s, %s parameters, %s on %s%s): %.2f GiB of weights read in %.2f s,"
        " %.2f s in all",
        config.model.model,
        facts.architecture,
        _count(facts.num_parameters),
        facts.dtype,
        facts.device,
        f"; {facts.quantization}" if facts.quantization else "",
        facts.weight_bytes / 2**30,
        facts.load_seconds,
        time.perf_counter() - started,
    )
    started = time.perf_counter()
    capacity = executor.reserve()
    try:
        granted = fit_model_len(config, facts.max_model_len, capacity)
    except ConfigError:
        executor.stop()
        raise
    _log_capacity(capacity, granted, time.perf_counter() - started)
    eos = {*checkpoint.generation.eos_token_ids, tokenizer.eos_token_id}
    return Engine(
        config,
        recorded(executor, config, checkpoint.path, facts, capacity),
        facts,
        capacity,
        granted,
        eos_token_ids=tuple(sorted(i for i in eos if i is not None)),
    )


def start_engine(config: EngineConfig, engine_id: str) -> tuple[Engine, EngineInfo]:
    """A replica for clients: its engine, and what they are told of it.

    It starts in a thread that ends then, and may run in any other: OpenMP keeps a team for every
    thread that has computed, and where teams have more threads than there are cores, none spins
    for its next work any longer (measured: a server's cores were idle for 12 instead of 5 %).
    Raises CheckpointError or ConfigError.
    """
    with ThreadPoolExecutor(1, "manta-start") as thread:
        return thread.submit(_start_engine, config, engine_id).result()


def _start_engine(config: EngineConfig, engine_id: str) -> tuple[Engine, EngineInfo]:
    options = config.model
    checkpoint = open_checkpoint(config)
    tokenizer_path = options.tokenizer or str(checkpoint.path)
    tokenizer = Tokenizer.load(tokenizer_path, options.revision)
    auto = options.generation_config == "auto"
    defaults = default_sampling(checkpoint) if auto else SamplingParams()
    says_length = auto and "max_new_tokens" in checkpoint.generation.defaults
    engine = start_replica(config, checkpoint, tokenizer)
    info = EngineInfo(
        engine_id=engine_id,
        model=options.model,
        tokenizer=tokenizer_path,
        revision=options.revision,
        chat_template=options.chat_template,
        max_model_len=engine.max_model_len,
        vocab_size=engine.facts.vocab_size,
        max_logprobs=options.max_logprobs,
        block_size=engine.capacity.block_size,
        num_device_blocks=engine.capacity.num_device_blocks,
        num_cpu_blocks=engine.capacity.num_cpu_blocks,
        scheduling_policy=config.scheduler.scheduling_policy,
        default_sampling=defaults,
        recommended_max_tokens=defaults.max_tokens if says_length else None,
        step_timeout=config.parallel.step_timeout,
        failover=config.failover,
        chat_options=options.chat,
        batch_invariant=engine.facts.batch_invariant,
        generates=engine.facts.generates,
        pooling=engine.facts.pooling,
        vector_size=engine.facts.vector_size,
    )
    return engine, info


def _make_executor(
    config: EngineConfig, checkpoint: Checkpoint, bar: LoadBar, launcher: Launcher | None
) -> LocalExecutor | ParallelExecutor:
    """In this process for one shard on a CPU; else over workers. On CUDA a single one too has a
    process of its own: for the settings of CUDA's libraries, which are read when they start, and
    for a Python that nobody else keeps busy."""
    parallel = config.parallel
    alone = parallel.world_size == 1
    if alone and choose_device(config.device.device).type == "cpu":
        return LocalExecutor(config, checkpoint.path, bar.read)
    if launcher is None and (alone or parallel.distributed_executor_backend == "mp"):
        launcher = ProcessLauncher(config)
    elif launcher is None:
        from cluster.actors import RayLauncher  # Ray takes a second to import

        launcher = RayLauncher(config)
    is_folder = Path(config.model.model).expanduser().is_dir()
    is_folder |= config.model.model == EMBEDDED_MODEL
    progress = partial(bar.read, "")
    return ParallelExecutor(config, checkpoint.path, is_folder, launcher, progress)


def fit_model_len(config: EngineConfig, wanted: int, capacity: Capacity) -> int:
    """``wanted``, or less if the device blocks hold less and the user asked for no length.

    Raises ConfigError if they hold less than the user asked for.
    """
    room = capacity.num_device_blocks * capacity.block_size
    if wanted <= room:
        return wanted
    if config.model.max_model_len is not None:
        raise ConfigError(
            f"max_model_len must be at most {room}, which is what {capacity.num_device_blocks}"
            f" device blocks hold, got {wanted}; or give the KV cache more memory"
            " (kv_cache_memory_bytes, gpu_memory_utilization, num_gpu_blocks_override)"
        )
    log.warning("max_model_len is %d, not %d: the device blocks hold no more", room, wanted)
    return room


def _log_capacity(capacity: Capacity, max_model_len: int, seconds: float) -> None:
    block = capacity.block_bytes
    log.info(
        "Reserved %s device blocks (%.2f GiB) and %s CPU blocks (%.2f GiB) of %d tokens in %s,"
        " warmed up, in %.2f s (attention: %s)",
        f"{capacity.num_device_blocks:,}",
        capacity.num_device_blocks * block / 2**30,
        f"{capacity.num_cpu_blocks:,}",
        capacity.num_cpu_blocks * block / 2**30,
        capacity.block_size,
        capacity.kv_cache_dtype,
        seconds,
        capacity.attention_backend,
    )
    if capacity.num_states:
        log.info(
            "States of recurrent layers: %s on the device (%.2f GiB), %s on the CPU",
            f"{capacity.num_states:,}",
            capacity.num_states * capacity.state_bytes / 2**30,
            f"{capacity.num_cpu_states:,}",
        )
    tokens = capacity.num_device_blocks * capacity.block_size
    log.info(
        "Maximum concurrency for %s tokens per request: %.2fx",
        f"{max_model_len:,}",
        tokens / max_model_len,
    )


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
