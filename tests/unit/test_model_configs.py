"""What config.json says of a model: read, or refused by the field's name."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import SHAPES
from engine.errors import CheckpointError
from tests.support.checkpoints import configure
from workers.attention import choose_backends
from workers.checkpoint import Config, load_config
from workers.models import attention_shapes, build_model, read_traits
from workers.models.decoder import DecoderTraits
from workers.parallel import Group, Place, Stage

FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': is not supported; allowed: silu"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_local_experts": 8}, "num_local_experts=8: is not supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
    ("llama", {"sliding_window": 16}, "sliding_window=16: is not supported"),
    ("llama", {"hidden_size": "64"}, "hidden_size='64': must be a positive integer"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0: must be a positive integer"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads"),
    (
        "llama",
        {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
        "must divide",
    ),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': must be true or false"),
    ("llama", {"rms_norm_eps": -1}, "rms_norm_eps=-1: must be a positive number"),
    ("llama", {"layer_types": ["sliding_attention"] * 3}, "layer_types=.*all be full_attention"),
    ("llama", {"architectures": ["GPT2LMHeadModel"]}, "none is supported; known: LlamaFor"),
    (
        "llama",
        {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.M"}},
        r"runs no code of checkpoints \(auto_map\)",
    ),
    ("llama", {"architectures": ["MistralForCausalLM"]}, "model_type='llama': must be 'mistral'"),
    ("llama", {"architectures": None, "model_type": "gpt2"}, "model_type='gpt2': is not supported"),
    ("mistral", {"attention_bias": True}, "attention_bias=True: is not supported"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types=.*all be sliding_attention"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias=True"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types=.*must hold 3 times"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types=.*must hold 3 times"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "needs use_sliding_window"),
    (
        "qwen3-5",
        {"layer_types": ["linear_attention"] * 3},
        "layer_types=.*must hold full_attention",
    ),
    ("qwen3-5", {"layer_types": ["sliding_attention"] * 3}, "layer_types=.*must hold 3 times"),
    ("qwen3-5", {"linear_num_value_heads": 3}, "linear_num_value_heads=3: must be a multiple"),
    ("qwen3-5", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim=1: must be at least 2"),
    ("qwen3-5", {"num_experts": 8}, "num_experts=8: is not supported"),
    ("qwen3-5-moe", {"num_experts": 0}, "num_experts=0: must be a positive integer"),
    ("qwen3-next", {"num_experts_per_tok": 7}, "num_experts_per_tok=7: must be at most .* 6"),
    ("qwen3-next", {"mlp_only_layers": 0}, "mlp_only_layers=0: must be a list of layers' numbers"),
    ("nemotron-h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu': .*must be relu2"),
    ("nemotron-h", {"use_bias": True}, "use_bias=True: is not supported; it must be False"),
    ("nemotron-h", {"time_step_limit": [0.1, 1.0]}, r"time_step_limit=\[0.1, 1.0\]: is not supp"),
    ("nemotron-h", {"attention_bias": True}, "attention_bias=True: is not supported"),
    ("nemotron-h", {"layers_block_type": ["mamba", "mlp"]}, "block_type=.*must hold attention"),
    ("nemotron-h", {"layers_block_type": ["conv"]}, "block_type=.*nothing but linear_attention,"),
    ("nemotron-h", {"layers_block_type": "M*-"}, "layers_block_type='M..': must hold nothing but"),
    (
        "nemotron-h",
        {"layers_block_type": None, "hybrid_override_pattern": "M*X"},
        r"hybrid_override_pattern='M\*X': must hold nothing but M, \*, -, E",
    ),
    ("nemotron-h", {"num_hidden_layers": 5}, "num_hidden_layers=5: must be the length of layers"),
    ("nemotron-h", {"n_groups": 3}, r"n_groups=3: must divide mamba_num_heads \(4\)"),
    ("nemotron-h", {"conv_kernel": 1}, "conv_kernel=1: must be at least 2"),
    ("nemotron-h-experts", {"n_shared_experts": 2}, "n_shared_experts=2: .*must be 1"),
    ("nemotron-h-experts", {"moe_latent_size": 0}, "moe_latent_size=0: must be a positive"),
    ("opt", {"activation_function": "silu"}, "activation_function='silu': .*allowed: relu, gelu"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: .* at most 4096"),
    ("opt", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: .* at most 4096"),
    ("llama", {"vocab_size": 10**30}, "vocab_size=10+: .* at most 16777216"),
    ("llama", {"max_position_embeddings": 10**9}, "max_position_embeddings=10+: .* at most"),
    ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf: must be a positive number"),
    ("llama", {"rope_theta": 1e308}, "rope_theta=1e\\+308: must be a positive number"),
    ("llama", {"model_type": ["llama"] * 10**6}, "model_type=.*must be a string"),
    ("llama", {"architectures": [["LlamaForCausalLM"]]}, "architectures=.*none is supported"),
    ("qwen2", {"layer_types": [["full_attention"]] * 3}, "layer_types=.*must hold 3 times"),
    ("qwen2", {"max_window_layers": "2"}, "max_window_layers='2': must be an integer"),
    *(
        ("llama", {"rope_scaling": {"rope_type": kind, **fields}}, message)
        for kind, fields, message in (
            ("yarn", {"factor": 1e308}, "factor=1e\\+308: must be a positive number"),
            ("yarn", {"factor": 1e11}, "factor=10+.0: must leave at most 16777216 positions"),
            ("linear", {"factor": 1e11}, "factor=10+.0: must leave at most 16777216 positions"),
            ("yarn", {"factor": 2, "mscale": "1", "mscale_all_dim": 1}, "mscale='1': must be"),
            ("yarn", {"factor": 2, "beta_fast": 1e-320}, "beta_fast=.*: must be a positive"),
            ("yarn", {"factor": 2, "rope_theta": 1}, "rope_theta=1: yarn needs one over 1"),
            ("llama3", {"factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}, "must be over"),
        )
    ),
    ("opt", {"num_attention_heads": 5}, "num_attention_heads=5: must divide hidden_size"),
    (
        "phi3-long",
        {"rope_scaling": {"type": "su", "short_factor": [1.0]}},
        r"short_factor=\[1.0\]:",
    ),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 2}}, "must be at most 1, not 2"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "even head size, not 0"),
    ("olmo3", {"rope_parameters": {"rope_theta": 1e4}}, "must hold an object for full_attention"),
    ("smollm3", {"no_rope_layers": [1, 2, 1]}, "no_rope_layers=.*must hold 3 times 0 or 1"),
    ("granite", {"logits_scaling": 0}, "logits_scaling=0: must be a positive number"),
    ("exaone4", {"sliding_window_pattern": "LX", "layer_types": None}, "hold L and G only"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: is not supported"),
    ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping=-1: must be a positive"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3", {"hidden_activation": "relu"}, "hidden_activation='relu'.*gelu_pytorch_tanh"),
    ("gemma3", {"sliding_window": None}, "sliding_window=None: is missing"),
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5: must be at most .* 4"),
    ("qwen3-moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers=.*list of layers' numbers"),
    ("glm4-moe", {"n_group": 3}, r"n_group=3: must cut n_routed_experts \(8\) into groups of 2"),
    ("glm4-moe", {"n_group": 8}, r"n_group=8: must cut n_routed_experts \(8\) into groups of 2"),
    ("glm4-moe", {"topk_group": 5}, r"topk_group=5: must be at most n_group \(4\)"),
    ("glm4-moe", {"topk_group": 1}, "num_experts_per_tok=3: must be at most .* 2"),
    (
        "glm4-moe",
        {"first_k_dense_replace": -1},
        "first_k_dense_replace=-1: must be an integer from",
    ),
    ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob=True: must be false"),
    ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'.*greedy, group_limited"),
    ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax'.*allowed: sigmoid"),
    ("deepseek-v3", {"num_key_value_heads": 2}, r"num_key_value_heads=2: must be num_attention_h"),
    ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq=2: must be 1"),
    ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank=None: is missing"),
    ("glm4-moe-lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types=.*hold 3 times dense or"),
    ("gemma4", {"use_bidirectional_attention": "all"}, "attention='all'.*allowed: vision"),
    ("gemma4", {"num_kv_shared_layers": 6}, "num_kv_shared_layers=6: leaves no layer"),
    ("gemma4", {"num_kv_shared_layers": 5}, "num_kv_shared_layers=5: leaves no layer of a kind"),
    ("gemma4-moe", {"top_k_experts": 7}, "top_k_experts=7: must be at most .* from, 6"),
    ("gemma4-moe", {"num_experts": None}, "num_experts=None: is missing"),
    ("gemma4", {"vocab_size_per_layer_input": 64}, "per_layer_input=64: must be at least 128"),
    ("gemma4", {"per_layer_config": {"0": {"head_dim": 8}}}, r"per_layer_config=.*layers \[1, 3"),
    (
        "gemma4",
        {"per_layer_config": {"01": {"size": 8}, "3": {"size": 8}, "5": {"size": 8}}},
        "an object of head_dim and num_key_value_heads",
    ),
    ("gpt-oss", {"swiglu_limit": 0}, "swiglu_limit=0: must be a positive number"),
    ("gpt-oss", {"num_experts_per_tok": 5}, "num_experts_per_tok=5: must be at most .* 4"),
    ("gpt-oss", {"layer_types": ["full_attention"]}, "layer_types=.*must hold 3 times"),
    ("minimax-m2", {"scoring_func": "softmax"}, "scoring_func='softmax': .*allowed: sigmoid"),
    ("minimax-m2", {"shared_intermediate_size": 8}, "shared_intermediate_size=8: is not supported"),
    ("minimax-m2", {"rotary_dim": 64, "rope_parameters": None}, "must be at most 1, not 2"),
    ("qwen3-moe", {"num_local_experts": 0}, "num_local_experts=0: must be a positive integer"),
]


@pytest.mark.parametrize(("name", "fields", "message"), FOREIGN)
def test_what_would_change_the_mathematics_is_refused(
    name: str, fields: dict[str, Any], message: str, copy: Callable[[str], Path]
) -> None:
    path = copy(name)
    configure(path, **fields)
    with pytest.raises(CheckpointError, match=message):
        read_traits(load_config(path))


def test_neutral_values_of_foreign_fields_are_harmless(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    before = read_traits(load_config(path))
    configure(
        path,
        quantization_config=None,
        partial_rotary_factor=1.0,
        num_local_experts=0,
        layer_types=["full_attention"] * 3,
        architectures=None,
        anything_else=3,
    )
    assert read_traits(load_config(path)) == before


def test_minimax_may_say_the_rotation_by_its_size(copy: Callable[[str], Path]) -> None:
    path = copy("minimax-m2")
    before = read_traits(load_config(path))
    configure(path, rope_parameters=None, rotary_dim=16)
    assert read_traits(load_config(path)) == before


def test_mixers_of_nemotron_by_letters_or_by_older_names(copy: Callable[[str], Path]) -> None:
    path = copy("nemotron-h-experts")
    before = read_traits(load_config(path))
    configure(path, layers_block_type=["mamba", "moe", "attention", "mamba"])
    assert read_traits(load_config(path)) == before
    configure(path, layers_block_type=None, hybrid_override_pattern="ME*M")
    assert read_traits(load_config(path)) == before
    configure(path, hybrid_override_pattern="M-*M", time_step_limit=[0.0, float("inf")])
    assert read_traits(load_config(path)) != before


@pytest.mark.parametrize("name", ["qwen2-sliding", "qwen3-sliding"])
def test_windows_follow_max_window_layers(name: str, copy: Callable[[str], Path]) -> None:
    path = copy(name)
    explicit = read_traits(load_config(path))
    configure(path, layer_types=None)
    implied = read_traits(load_config(path))
    assert isinstance(implied, DecoderTraits) and implied == explicit
    windows = [layer.window for layer in implied.layers]
    assert windows == ([None, 6, 6] if name == "qwen2-sliding" else [None, None, 6])
    configure(path, use_sliding_window=False)
    full = read_traits(load_config(path))
    assert isinstance(full, DecoderTraits) and not any(layer.window for layer in full.layers)


def test_rotary_embeddings_of_gemma3_in_either_layout(copy: Callable[[str], Path]) -> None:
    path, scaling = copy("gemma3"), {"rope_type": "linear", "factor": 8.0}
    local = {"rope_type": "default", "rope_theta": 2e4}
    configure(path, rope_parameters={"full_attention": scaling, "sliding_attention": local})
    new = read_traits(load_config(path))
    configure(path, rope_parameters=None, rope_scaling=scaling, rope_local_base_freq=2e4)
    assert read_traits(load_config(path)) == new
    assert isinstance(new, DecoderTraits) and new.max_position == 256
    ropes = [layer.rope for layer in new.layers if layer.rope is not None]
    assert [(rope.theta, rope.factor) for rope in ropes] == [(2e4, 1), (1e6, 8), (2e4, 1)]


@pytest.mark.parametrize("path", sorted(SHAPES.glob("*.json")), ids=lambda path: path.stem)
def test_a_benchmarks_shape_has_as_many_parameters_as_its_name_says(path: Path) -> None:
    config = Config(json.loads(path.read_text()))
    traits = read_traits(config)
    place = Place(torch.device("meta"), torch.bfloat16, Group())
    backend = choose_backends(
        attention_shapes(traits, replace(place, device=torch.device("cpu")), 16)
    )
    model = build_model(config, place, Stage.whole(traits.num_layers), backend, 64)
    count = sum(math.prod(parameter.shape) for parameter in model.parameters())
    named = re.search(r"(\d[\d.]*)(b|m)(-|$)", path.stem)
    assert named is not None
    assert count / 10 ** {"b": 9, "m": 6}[named[2]] == pytest.approx(float(named[1]), rel=0.05)
