"""The one configuration of an engine: the command line, ``LLM`` and the server build from it.

``EngineConfig.from_options(**options)`` takes flat options with the names that vLLM's users know
and gives small frozen groups. Each option is declared once, as a field below: its help, its
choices and its bounds are in the field's metadata, from which the command line is made too.
"""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from engine.errors import ConfigError
from engine.values import real, whole
from engine.vllm_options import translated

Group = TypeVar("Group")

GPU_STEP_TOKENS = 8192
FP8_CACHES = ("fp8", "fp8_e4m3", "fp8_per_token_head")  # vLLM's names, of which all mean one here
EMBEDDED_MODEL = "manta-demo"  # the name of the chat model that ships inside the package


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    unset: tuple[Any, ...] = (),
) -> Any:
    """A field of a group, with what the command line and the checks need to know of it. ``unset``
    are values that mean None."""
    meta = {"help": help, "choices": choices, "least": least, "most": most, "unset": unset}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class ChatOptions:
    """How chats become prompts, as far as options say: see those of ``ModelConfig``."""

    content_format: str = "auto"
    sanitize_control_tokens: bool = False


@dataclass(frozen=True)
class ServedAs:
    """What clients see of a model beside its checkpoint: the ``names`` that they may give for it,
    the checkpoint's own by default, and how what it writes is read."""

    names: tuple[str, ...] = ()
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"


@dataclass(frozen=True)
class ModelConfig:
    """What is served."""

    model: str = option(
        EMBEDDED_MODEL,
        "a checkpoint folder, a Hugging Face hub id, or manta-demo, the model inside the package",
    )
    tokenizer: str | None = option(None, "a tokenizer's folder or hub id; the model's by default")
    revision: str | None = option(None, "branch, tag or commit of the hub's model")
    dtype: str = option(
        "auto",
        "type of weights and activations; auto takes the checkpoint's (bfloat16 for float16 on a"
        " CPU)",
        choices=("auto", "bfloat16", "bf16", "float16", "half", "float32", "float"),
    )
    quantization: str | None = option(
        None,
        "fp8 makes the weights of linear layers 8-bit floats while they are loaded, with a scale"
        " for each output, and rounds what goes into them; a quantized checkpoint needs no option,"
        " and takes its own method alone",
        choices=("fp8", "gptq", "awq", "compressed-tensors", "mxfp4"),
    )
    load_format: str = option(
        "auto",
        "auto prefers safetensors to pytorch_model.bin; dummy makes random weights",
        choices=("auto", "safetensors", "pt", "dummy"),
    )
    max_model_len: int | None = option(
        None,
        "most tokens of prompt and output together; by default, or with auto, the model's own limit"
        " or what the KV blocks hold, if that is less",
        least=1,
        unset=("auto", -1),
    )
    chat_template: str | None = option(
        None, "a chat template's file, or the template itself; the checkpoint's by default"
    )
    chat_template_content_format: str = option(
        "auto",
        "how the chat template is given the content of messages: string, as one string; openai, as"
        " a list of parts; auto, as it was sent if the template takes that",
        choices=("auto", "string", "openai"),
    )
    sanitize_control_tokens: bool = option(
        False,
        "encode control tokens that messages hold (<|im_end|>, say) as ordinary text; without it"
        " they are control tokens, as in transformers",
    )
    pooling: str = option(
        "auto",
        "what prompts become vectors by: auto, as the checkpoint's sentence-transformers files or"
        " its architecture say; the hidden state of the last token or of the first (cls), or the"
        " mean of all, also of a model that generates; yes_no, a score from the logits of the"
        " tokens yes and no (Qwen3-Reranker); none, no vectors",
        choices=("auto", "none", "last", "mean", "cls", "yes_no"),
    )
    max_logprobs: int = option(
        20, "most logprobs that a request may ask for; -1 is no limit", least=-1
    )
    generation_config: str = option(
        "auto",
        "auto takes default sampling parameters from the checkpoint's generation_config.json;"
        " vllm takes none",
        choices=("auto", "vllm"),
    )
    seed: int = option(0, "seed of the engine: dummy weights, and requests that bring none")

    @property
    def chat(self) -> ChatOptions:
        return ChatOptions(self.chat_template_content_format, self.sanitize_control_tokens)


@dataclass(frozen=True)
class CacheConfig:
    """The KV blocks."""

    block_size: int | None = option(
        None, "tokens in a KV block; the attention backend's favourite by default", least=1
    )
    gpu_memory_utilization: float | None = option(
        None,
        "fraction of the device's memory for weights, activations and KV blocks; 0.9 on CUDA by"
        " default, on a CPU see kv_cache_memory_bytes",
        least=0.01,
        most=1.0,
    )
    kv_cache_dtype: str = option(
        "auto",
        "what keys and values are kept as: fp8, as 8-bit floats (E4M3) with a scale for each token"
        " and head, so that twice as many fit; auto takes the model's type, or fp8 if the"
        " checkpoint's kv_cache_scheme asks for it",
        choices=("auto", *FP8_CACHES, "bfloat16", "float16", "float32"),
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "bytes for the device's KV blocks, instead of gpu_memory_utilization; on a CPU the default"
        " is 4 GiB, or 40 % of the free memory if that is less",
        least=1,
    )
    prefault_kv_cache: bool = option(
        False,
        "on a CPU, take the KV blocks' memory from the system in the background after the start,"
        " not as blocks are first written, which slows steps; servers do by default, and on CUDA"
        " it is always taken at the start",
    )
    num_gpu_blocks_override: int | None = option(
        None, "number of device KV blocks, instead of what fits", least=1
    )
    swap_space: float = option(
        4.0, "GiB of CPU memory for preempted requests' KV blocks and cold prefixes", least=0
    )
    enable_prefix_caching: bool = option(True, "share the KV blocks of common prefixes")
    num_mamba_states: int | None = option(
        None,
        "of a model with recurrent layers, states on the device: one for each sequence that runs,"
        " and those kept for prefixes; by default as many as half of the memory of KV blocks holds,"
        " and at most 4 for each of max_num_seqs",
        least=1,
    )
    mamba_block_size: int | None = option(
        None,
        "of a model with recurrent layers, tokens after which a state is kept within a prompt; by"
        " default it is kept only where prompts end or branch off and where outputs end",
        least=1,
    )


@dataclass(frozen=True)
class SchedulerConfig:
    """Who runs, and how much in one step."""

    max_num_seqs: int = option(
        256,
        "most sequences that run at once; not more than max_num_batched_tokens, if only that is"
        " given",
        least=1,
    )
    max_num_batched_tokens: int = option(
        2048,
        "most tokens that one step computes; 8192 by default on CUDA; not less than max_num_seqs,"
        " or max_model_len without chunked prefill, if only that is given",
        least=1,
    )
    enable_chunked_prefill: bool = option(True, "split long prompts over steps, mixed with decodes")
    scheduling_policy: str = option(
        "fcfs",
        "who runs first: by arrival; by priority (lower first); or fair: each client in turn, by"
        " tokens (a client is an API key or, on a server without keys, an address)",
        choices=("fcfs", "priority", "fair"),
    )  # fmt: skip
    preemption_mode: str = option(
        "auto",
        "what becomes of a preempted request's KV blocks: the cheaper by measured costs, copied to"
        " CPU blocks, or computed again",
        choices=("auto", "swap", "recompute"),
    )
    max_queued_requests: int | None = option(
        None, "refuse further requests while this many wait", least=1
    )
    max_queued_tokens: int | None = option(
        None, "refuse further requests while this many prompt tokens wait", least=1
    )


@dataclass(frozen=True)
class DeviceConfig:
    """Where and how the model is computed."""

    device: str = option(
        "auto",
        "where the model runs; auto is cuda if there is one",
        choices=("auto", "cpu", "cuda"),
    )
    attention_backend: str = option(
        "auto",
        "triton is the kernels for NVIDIA GPUs, cpu the compiled ones, gather plain PyTorch; auto"
        " takes the fastest that works",
        choices=("auto", "triton", "cpu", "gather"),
    )
    batch_invariance: str = option(
        "auto",
        "whether a row's bits must not depend on the others of its batch: auto has it wherever the"
        " device can and says where it cannot; on refuses to start there; off leaves it to CUDA's"
        " libraries",
        choices=("auto", "on", "off"),
    )
    enforce_eager: bool = option(
        False, "never capture CUDA graphs: a faster start, and slower steps"
    )
    max_cudagraph_capture_size: int = option(
        512, "on CUDA, steps of up to so many tokens are captured as graphs", least=1
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is split over workers, and how these are started and watched."""

    tensor_parallel_size: int = option(1, "ranks that split each layer", least=1)
    enable_expert_parallel: bool = option(
        False,
        "give each rank of a layer some of its experts whole, rather than a part of every expert",
    )
    pipeline_parallel_size: int = option(1, "stages that split the layers", least=1)
    pipeline_partition: str | None = option(
        None, "layers of each pipeline stage, as 12,10,10; as even as can be by default"
    )
    distributed_executor_backend: str = option(
        "ray",
        "what starts the workers, if there are several: ray on a cluster (RAY_ADDRESS, or one on"
        " this machine), mp as plain processes of this machine",
        choices=("ray", "mp"),
    )
    worker_cpus: float | None = option(
        None,
        "CPUs that a worker asks for, and so its threads; by default it asks for 1 (none if it has"
        " a GPU) and takes an even share of its machine's",
        least=0.01,
    )
    worker_gpus: float = option(
        1.0, "GPUs of a worker on CUDA; with less than 1, workers share one", least=0.01, most=1.0
    )
    worker_resource: str | None = option(
        None,
        "a resource of the cluster's own making (ray start --resources) of which a worker asks for"
        " one: workers go only where it is",
    )
    placement_timeout: float = option(
        60.0, "seconds to wait until Ray has room for the workers", least=0
    )
    rendezvous_port: int = option(
        0, "port at which workers find each other; 0 takes a free one", least=0, most=65535
    )
    step_timeout: float = option(
        300.0, "seconds after which a step that gives no result is a failure", least=0.1
    )

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def partition(self) -> tuple[int, ...]:
        """``pipeline_partition`` as numbers; empty if none was given."""
        words = self.pipeline_partition.split(",") if self.pipeline_partition is not None else []
        try:
            return tuple(int(word) for word in words)
        except ValueError:
            raise ConfigError(
                "pipeline_partition must be numbers of layers between commas, as 12,10,10, got"
                f" {self.pipeline_partition!r}"
            ) from None


@dataclass(frozen=True)
class FailoverConfig:
    """What becomes of requests when an engine, or one of its workers, is lost."""

    max_failovers: int = option(
        2,
        "engines that a request may outlive in a row without a new token, while they ran it; then"
        " it ends with an error, as it may be what ends them; 0 ends it with the first",
        least=0,
    )
    failover_timeout: float = option(
        300.0,
        "seconds that a request which has lost its engine waits for one to go on at",
        least=0,
    )


@dataclass(frozen=True)
class LogConfig:
    """What is shown."""

    use_tqdm_on_load: bool = option(True, "a progress bar while weights load")
    schedule_log: str | None = option(
        None,
        "a new file to which every plan and result is appended, for manta replay; FILE.1 and so on"
        " if it is there already",
    )


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine is told. Measured facts are never written back into it."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    device: DeviceConfig = DeviceConfig()
    parallel: ParallelConfig = ParallelConfig()
    failover: FailoverConfig = FailoverConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def from_options(cls, **options: Any) -> "EngineConfig":
        """An engine's config from flat options, as ``LLM`` and the command line have them. None is
        the default, and vLLM's options are understood (see ``engine.vllm_options``).

        Raises ConfigError, naming the option and what is allowed, for an unknown option, a wrong
        value or a contradiction.
        """
        own = translated(options, [f.name for _, f in declared_options()])
        config = cls(**{name: group_of(group, own) for name, group in _groups()})
        config = replace(config, scheduler=_fitted(config, own))
        config._check_together()
        return config

    def _check_together(self) -> None:
        scheduler, cache = self.scheduler, self.cache
        if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({scheduler.max_num_batched_tokens}) must be at least"
                f" max_num_seqs ({scheduler.max_num_seqs}), so that every sequence can decode"
            )
        if cache.gpu_memory_utilization is not None and cache.kv_cache_memory_bytes is not None:
            raise ConfigError("give gpu_memory_utilization or kv_cache_memory_bytes, not both")
        if self.parallel.worker_resource and self.parallel.distributed_executor_backend == "mp":
            raise ConfigError(
                "worker_resource is for distributed_executor_backend=ray: mp asks for nothing"
            )
        stages, partition = self.parallel.pipeline_parallel_size, self.parallel.partition
        if partition and len(partition) != stages:
            raise ConfigError(
                f"pipeline_partition has {len(partition)} numbers, pipeline_parallel_size is"
                f" {stages}: give one number for each stage"
            )

    def with_whole_prompts(self, length: int) -> "EngineConfig":
        """The same for an encoder, whose prompts of up to ``length`` tokens are never split: a step
        has room for one of these."""
        budget = max(self.scheduler.max_num_batched_tokens, length)
        return replace(
            self,
            scheduler=replace(
                self.scheduler, enable_chunked_prefill=False, max_num_batched_tokens=budget
            ),
        )

    def resolve_model_len(self, model_limit: int) -> int:
        """max_model_len for a model that allows ``model_limit`` tokens.

        Raises ConfigError if more are asked for, or if whole prompts of that many fit no step.
        """
        length = self.model.max_model_len or model_limit
        if length > model_limit:
            raise ConfigError(
                f"max_model_len must be at most {model_limit}, the model's own limit, got {length}"
            )
        budget = self.scheduler.max_num_batched_tokens
        if not self.scheduler.enable_chunked_prefill and budget < length:
            raise ConfigError(
                f"max_num_batched_tokens ({budget}) must be at least max_model_len ({length}) when"
                " enable_chunked_prefill is off"
            )
        return length


def with_gpu_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with what is not given as suits a GPU: its steps are larger, as it computes a
    prompt's token in a thousandth of the time that a CPU takes."""
    defaults: dict[str, Any] = {}
    if options.get("enable_chunked_prefill") is not False:
        budget = max(GPU_STEP_TOKENS, options.get("max_num_seqs") or 0)
        defaults["max_num_batched_tokens"] = budget
    given = {name: value for name, value in options.items() if value is not None}
    return {**options, **defaults, **given}


def _fitted(config: EngineConfig, given: Mapping[str, Any]) -> SchedulerConfig:
    """The scheduler's config with defaults that would contradict what was ``given`` fitted to it: a
    step has a token for every sequence that runs, and room for the longest prompt if that is not
    split."""
    scheduler = config.scheduler
    seqs, budget = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    if "max_num_batched_tokens" not in given:
        prompt = 0 if scheduler.enable_chunked_prefill else config.model.max_model_len or 0
        budget = max(budget, seqs, prompt)
    if "max_num_seqs" not in given:
        seqs = min(seqs, budget)
    return replace(scheduler, max_num_seqs=seqs, max_num_batched_tokens=budget)


def _groups() -> Iterator[tuple[str, type[Any]]]:
    for f in dataclasses.fields(EngineConfig):
        yield f.name, typing.cast(type, f.type)


def declared_options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(group name, field) of every option, in the order of declaration."""
    for name, group in _groups():
        for f in dataclasses.fields(group):
            yield name, f


def group_of(group: type[Group], options: Mapping[str, Any]) -> Group:
    """A group of declared options with those of ``options`` that are its own.

    Raises ConfigError, naming the option and what is allowed, for a wrong value.
    """
    fields = dataclasses.fields(typing.cast(typing.Any, group))
    own = [f for f in fields if f.name in options]
    return group(**{f.name: _checked(f, options[f.name]) for f in own})


def option_type(f: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The plain type of an option (tuple for a list of strings), and whether None is allowed."""
    if typing.get_origin(f.type) is tuple:
        return tuple, False
    if isinstance(f.type, types.UnionType):
        kinds = typing.get_args(f.type)
        return next(k for k in kinds if k is not types.NoneType), types.NoneType in kinds
    return typing.cast(type, f.type), False


_KINDS = {int: "an integer", float: "a number", str: "a string", tuple: "a list of strings"}


def allowed(f: dataclasses.Field[Any]) -> str:
    """What an option may be, for messages and help."""
    meta: Mapping[str, Any] = f.metadata
    kind, optional = option_type(f)
    if meta["choices"]:
        text = "one of " + ", ".join(meta["choices"])
    elif kind is bool:
        text = "True or False"
    else:
        text = _KINDS[kind]
        if meta["least"] is not None:
            text += f" of at least {meta['least']:g}"
        if meta["most"] is not None:
            text += f" and at most {meta['most']:g}"
    return text + (" or None" if optional else "")


def _checked(f: dataclasses.Field[Any], value: Any) -> Any:
    kind, optional = option_type(f)
    if optional and (value is None or (type(value) in (int, str) and value in f.metadata["unset"])):
        return None
    given, value = value, _plain(kind, value)
    if kind is tuple:
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
            raise ConfigError(f"{f.name} must be {allowed(f)}, got {given!r}")
        return tuple(value)
    ok = isinstance(value, kind)
    if ok and kind is float:
        ok = math.isfinite(value)
    meta = f.metadata
    if ok and meta["choices"]:
        ok = value in meta["choices"]
    if ok and meta["least"] is not None:
        ok = value >= meta["least"]
    if ok and meta["most"] is not None:
        ok = value <= meta["most"]
    if ok and f.name == "model":
        ok = bool(value)
    if not ok:
        raise ConfigError(f"{f.name} must be {allowed(f)}, got {given!r}")
    return value


def _plain(kind: type, value: Any) -> Any:
    """The value as one of the ``kind``, if it is one of another sort: a whole number, a path, a
    type of torch's; else as it is, or None for no number."""
    if kind is int:
        return whole(value)
    if kind is float:
        return real(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is str and str(value).startswith("torch."):
        return str(value).removeprefix("torch.")
    return value
