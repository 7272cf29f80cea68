"""Engine options: each wrong value is refused by name, with what is allowed."""

import ast
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.settings import Settings
from engine.config import EMBEDDED_MODEL, EngineConfig, allowed, declared_options, option_type
from engine.errors import ConfigError, MantaError
from engine.vllm_options import ALIASES, FOREIGN, SHORT
from router.config import RouterConfig

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [f for _, f in declared_options()]
BY_NAME = {f.name: f for f in OPTIONS}
# The name and the default of each option that users of vLLM know, where manta means the same.
VLLM = {
    "model", "tokenizer", "revision", "dtype", "load_format", "max_model_len", "chat_template",
    "chat_template_content_format", "quantization",
    "max_logprobs", "generation_config", "seed", "block_size", "gpu_memory_utilization",
    "kv_cache_memory_bytes", "num_gpu_blocks_override", "swap_space", "enable_prefix_caching",
    "mamba_block_size", "kv_cache_dtype",
    "max_cudagraph_capture_size",
    "max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "scheduling_policy",
    "enforce_eager", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel",
    "use_tqdm_on_load",
    "pipeline_partition", "distributed_executor_backend", "worker_cpus", "worker_gpus",
    "worker_resource", "placement_timeout", "rendezvous_port", "step_timeout",
}  # fmt: skip


def wrong_values(f):
    kind, _ = option_type(f)
    meta = f.metadata
    values = {
        bool: [0, 1, "true", 0.5, []],
        int: [1.5, True, "1", math.nan, math.inf, [1]],
        float: [True, "0.5", math.nan, math.inf, -math.inf, 1j],
        str: [1, True, b"auto", ["auto"]],
    }[kind]
    if f.name == "model":
        values.append(None)
    if meta["choices"]:
        values += ["", "Auto", "nonsense"]
    if meta["least"] is not None:
        values += [meta["least"] - 1, -(10**30)]
    if meta["most"] is not None:
        values += [meta["most"] + 0.01, 10**30]
    return values


def right_values(f):
    kind, optional = option_type(f)
    meta = f.metadata
    of_kind = {bool: [True, False], str: ["x"], int: [7], float: [0.5]}
    values = list(meta["choices"]) or of_kind[kind]
    if meta["least"] is not None:
        values = [kind(meta["least"]), *values]
    if meta["most"] is not None:
        values = [kind(meta["most"]), *values]
    return [*values, None] if optional else values


def build(name, value):
    """The config with one option set, and what has to go along with it."""
    others = {"max_num_seqs": 1} if name == "max_num_batched_tokens" else {}
    return EngineConfig.from_options(**others, **{name: value})


def value_of(config, name):
    group = next(group for group, f in declared_options() if f.name == name)
    return getattr(getattr(config, group), name)


@pytest.mark.parametrize("f", OPTIONS, ids=lambda f: f.name)
def test_wrong_values_are_refused_with_what_is_allowed(f):
    for value in wrong_values(f):
        with pytest.raises(ConfigError) as error:
            build(f.name, value)
        assert str(error.value) == f"{f.name} must be {allowed(f)}, got {value!r}"
        for choice in f.metadata["choices"]:
            assert choice in str(error.value)
        for bound in (f.metadata["least"], f.metadata["most"]):
            assert bound is None or f"{bound:g}" in str(error.value)


@pytest.mark.parametrize("f", OPTIONS, ids=lambda f: f.name)
def test_right_values_are_taken_as_they_are(f):
    if f.name == "pipeline_partition":
        assert build(f.name, "12").parallel.partition == (12,)
        return
    for value in right_values(f):
        got = value_of(build(f.name, value), f.name)
        assert got == value and isinstance(got, (option_type(f)[0], type(None)))


@pytest.mark.parametrize("f", OPTIONS, ids=lambda f: f.name)
def test_the_default_is_allowed_and_the_help_says_something(f):
    assert value_of(EngineConfig.from_options(), f.name) == f.default
    assert value_of(build(f.name, f.default), f.name) == f.default
    assert len(f.metadata["help"]) > 10


def test_every_option_is_honoured():
    """Each is read somewhere; one that nobody reads must be refused instead."""
    read = set()
    for folder in ("engine", "workers", "cluster", "deploy"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            read |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            }
    assert BY_NAME.keys() <= read


def test_names_are_known_and_unique():
    assert len(BY_NAME) == len(OPTIONS)
    assert BY_NAME.keys() >= VLLM
    assert BY_NAME.keys() - VLLM == {  # vLLM has none such, or under another meaning
        "device", "attention_backend", "batch_invariance", "preemption_mode", "max_queued_requests",
        "max_queued_tokens", "prefault_kv_cache", "sanitize_control_tokens", "schedule_log",
        "max_failovers", "failover_timeout", "pooling", "num_mamba_states",
    }  # fmt: skip


@pytest.mark.parametrize(
    "given, meant",
    [
        ("max_model_length", "max_model_len"),
        ("block_sizes", "block_size"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("max-num-seqs", "max_num_seqs"),
        ("Dtype", "dtype"),
    ],
)
def test_unknown_options_are_refused_with_the_nearest(given, meant):
    with pytest.raises(ConfigError, match=f"unknown option {given}; did you mean {meant}\\?"):
        EngineConfig.from_options(**{given: 1})


def test_an_unknown_option_like_no_other_gets_no_suggestion():
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_options(xyz=1)
    assert str(error.value) == "unknown option xyz"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"max_num_batched_tokens": 8, "max_num_seqs": 9},
            r"max_num_batched_tokens \(8\) must be at least max_num_seqs \(9\)",
        ),
        (
            {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 1},
            "gpu_memory_utilization or kv_cache_memory_bytes, not both",
        ),
        ({"model": ""}, "model must be a string"),
        (
            {"pipeline_parallel_size": 3, "pipeline_partition": "2,1"},
            "pipeline_partition has 2 numbers, pipeline_parallel_size is 3",
        ),
        ({"pipeline_partition": "2,x"}, "pipeline_partition must be numbers of layers between"),
        ({"worker_gpus": 2.0}, "worker_gpus must be a number of at least 0.01 and at most 1"),
        (
            {"worker_resource": "big", "distributed_executor_backend": "mp"},
            "worker_resource is for distributed_executor_backend=ray",
        ),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_options(**options)


def test_an_integer_is_a_number_and_a_path_is_a_string():
    config = EngineConfig.from_options(
        swap_space=1, model=Path("a/b"), chat_template=Path("c.jinja")
    )
    assert config.cache.swap_space == 1.0 and isinstance(config.cache.swap_space, float)
    assert config.model.model == "a/b" and config.model.chat_template == "c.jinja"


@pytest.mark.parametrize(
    "given, seqs, budget",
    [
        ({}, 256, 2048),
        ({"max_num_batched_tokens": 128}, 128, 128),
        ({"max_num_batched_tokens": 4096}, 256, 4096),
        ({"max_num_seqs": 4000}, 4000, 4000),
        ({"max_num_seqs": 4}, 4, 2048),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 4}, 4, 4),
        ({"enable_chunked_prefill": False, "max_model_len": 5000}, 256, 5000),
        ({"enable_chunked_prefill": False, "max_model_len": 500}, 256, 2048),
        ({"max_model_len": 5000}, 256, 2048),
    ],
)
def test_a_default_is_fitted_to_what_is_given(given, seqs, budget):
    scheduler = EngineConfig.from_options(**given).scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (seqs, budget)


def test_numbers_that_are_whole_are_whole_and_a_type_has_a_name():
    config = EngineConfig.from_options(
        max_num_seqs=8.0, block_size=np.int64(16), swap_space=np.float32(0.5), dtype=torch.bfloat16
    )
    assert config == EngineConfig.from_options(
        max_num_seqs=8, block_size=16, swap_space=0.5, dtype="bfloat16"
    )
    assert type(config.cache.block_size) is int and type(config.cache.swap_space) is float


def test_auto_is_the_models_length_or_what_fits():
    for value in ("auto", -1, None):
        assert EngineConfig.from_options(max_model_len=value) == EngineConfig()
    for value in (0, -2, "Auto", -1.0, False):
        with pytest.raises(ConfigError, match="max_model_len must be an integer of at least 1"):
            EngineConfig.from_options(max_model_len=value)


def test_none_is_the_default():
    assert EngineConfig.from_options(**dict.fromkeys(BY_NAME.keys() - {"model"})) == EngineConfig()


# ---- vLLM's options ----


@pytest.mark.parametrize("name", FOREIGN)
def test_options_of_vllms_may_ask_for_nothing_and_no_more(name):
    foreign = FOREIGN[name]
    for value in (None, "", {}, [], *(v for v in foreign.neutral if v is not ...)):
        assert EngineConfig.from_options(**{name: value}) == EngineConfig(), value
    if ... in foreign.neutral or (foreign.flag and len(foreign.neutral) == 2):
        return
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_options(**{name: "something"})
    assert str(error.value) == f"{name}='something' is not supported: {foreign.instead}"


def test_the_table_of_vllms_options_is_of_options_that_are_not_mantas():
    own = BY_NAME.keys() | {f.name for f in dataclasses.fields(RouterConfig)}
    assert not own & (FOREIGN.keys() | ALIASES.keys())
    assert set(ALIASES.values()) | SHORT.keys() <= own | FOREIGN.keys()
    assert all(len(foreign.instead) > 20 for foreign in FOREIGN.values())


def test_other_names_of_vllms():
    config = EngineConfig.from_options(kv_offloading_size=2)
    assert config.cache.swap_space == 2.0
    with pytest.raises(ConfigError, match="swap_space and swap_space are one|kv_offloading_size"):
        EngineConfig.from_options(swap_space=1, kv_offloading_size=2)
    with pytest.raises(ConfigError, match="data_parallel_size=2 is not supported: .*num_replicas"):
        EngineConfig.from_options(data_parallel_size=2)  # one engine is one replica
    settings = Settings.from_options({"model": "m", "data_parallel_size": 2, "root_path": None})
    assert settings.router.num_replicas == 2 and settings.options["num_replicas"] == 2


def test_errors_are_value_errors_and_mantas():
    with pytest.raises(ValueError) as error:
        EngineConfig.from_options(block_size=0)
    assert isinstance(error.value, MantaError)


def test_a_config_is_frozen():
    config = EngineConfig.from_options()
    assert config.model.model == EMBEDDED_MODEL
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.model = "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = None


def resolve(limit, **options):
    return EngineConfig.from_options(**options).resolve_model_len(limit)


def test_model_len():
    assert resolve(100) == 100
    assert resolve(100, max_model_len=100) == 100
    assert resolve(100, max_model_len=7) == 7
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": 300}
    assert resolve(300, **whole) == 300
    message = "max_model_len must be at most 100, the model's own limit, got 101"
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(100, max_model_len=101)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(300\) must be at least"
                       r" max_model_len \(301\) when enable_chunked_prefill is off"):  # fmt: skip
        resolve(301, **whole)
