"""Tiny random checkpoints of every family and variation, made by transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint to be made: ``config`` is what differs from the family's tiny base.

    Every forward pass is compared. What is generated takes seconds: one that differs from another
    within a layer alone is ``pressed``, run once with everything that an engine may do to a
    sequence, and one that differs in tables or weights is not run.
    """

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    generates: Literal["every way", "pressed", "no"] = "every way"

    def save(self, folder: Path, **options: Any) -> Path:
        """The checkpoint in ``folder``/name, random but always the same, float32."""
        path = folder / self.name
        self.build().save_pretrained(path, **options)
        return path

    def build(self) -> Any:
        """The transformers model, in eval mode with eager attention.

        Weights are larger and biases and norms less trivial than transformers initialises them,
        so that an argmax has a margin and nothing is multiplied by 1 or added as 0.
        """
        config_class, model_class, base = FAMILIES[self.family]
        config = config_class(**(base | self.config))
        config._attn_implementation = "eager"
        torch.manual_seed(sum(self.name.encode()))
        model = model_class(config).eval()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if tensor.dim() == 2:
                    tensor.normal_(0, 0.7 / tensor.shape[1] ** 0.5 if "embed" not in name else 0.6)
                else:
                    tensor.normal_(
                        1.0 if name.endswith(("norm.weight", "norm_f.weight")) else 0.0, 0.2
                    )
            for name, tensor in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    tensor.normal_(0.0, 0.2)
                elif name.endswith("layer_scalar"):
                    tensor.normal_(1.0, 0.2)
        return model


_LLAMA = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT = _LLAMA | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 40,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_HYBRID = _LLAMA | {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_SHARED_EXPERT = {
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, _LLAMA),
    "mistral": (
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        _LLAMA | {"sliding_window": 7},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, _LLAMA),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, _LLAMA | {"head_dim": 32}),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, _LLAMA),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM, _LLAMA),
    "olmo3": (
        transformers.Olmo3Config,
        transformers.Olmo3ForCausalLM,
        _LLAMA | {"sliding_window": 6, "layer_types": _ALTERNATING},
    ),
    "smollm3": (
        transformers.SmolLM3Config,
        transformers.SmolLM3ForCausalLM,
        _LLAMA | {"no_rope_layers": [1, 0, 1]},
    ),
    "granite": (
        transformers.GraniteConfig,
        transformers.GraniteForCausalLM,
        _LLAMA
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.5,
        },
    ),
    "ministral3": (
        transformers.Ministral3Config,
        transformers.Ministral3ForCausalLM,
        _LLAMA | {"head_dim": 16},
    ),
    "seed_oss": (
        transformers.SeedOssConfig,
        transformers.SeedOssForCausalLM,
        _LLAMA | {"head_dim": 32},
    ),
    "exaone4": (
        transformers.Exaone4Config,
        transformers.Exaone4ForCausalLM,
        _LLAMA | {"sliding_window": 6, "sliding_window_pattern": 2},
    ),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        _LLAMA
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        _LLAMA
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "layer_types": _ALTERNATING,
        },
    ),
    "gemma4": (
        transformers.Gemma4TextConfig,
        transformers.Gemma4ForCausalLM,
        _LLAMA
        | {
            "head_dim": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 130,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "final_logit_softcapping": 4.0,
        },
    ),
    "glm4": (transformers.Glm4Config, transformers.Glm4ForCausalLM, _LLAMA | {"head_dim": 24}),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        transformers.Glm4MoeForCausalLM,
        _LLAMA
        | {
            "head_dim": 32,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        _LLAMA
        | {
            "head_dim": 32,
            "sliding_window": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
            },
        },
    ),
    "minimax_m2": (
        transformers.MiniMaxM2Config,
        transformers.MiniMaxM2ForCausalLM,
        _LLAMA
        | {
            "head_dim": 32,
            "rotary_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        _LLAMA | {"num_local_experts": 4},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        _LLAMA
        | {
            "head_dim": 32,
            "moe_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        transformers.DeepseekV2ForCausalLM,
        _LATENT | {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        _LATENT | {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    ),
    "glm4_moe_lite": (
        transformers.Glm4MoeLiteConfig,
        transformers.Glm4MoeLiteForCausalLM,
        _LATENT | {"mlp_layer_types": ["dense", "sparse", "dense"]},
    ),
    "qwen3_5": (transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM, _HYBRID),
    "qwen3_5_moe": (
        transformers.Qwen3_5MoeTextConfig,
        transformers.Qwen3_5MoeForCausalLM,
        _HYBRID | _SHARED_EXPERT,
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        transformers.Qwen3NextForCausalLM,
        _HYBRID | _SHARED_EXPERT | {"mlp_only_layers": [0]},
    ),
    "nemotron_h": (
        transformers.NemotronHConfig,
        transformers.NemotronHForCausalLM,
        _LLAMA
        | {
            "head_dim": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 20,
            "n_groups": 2,
            "ssm_state_size": 12,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 40,
            "routed_scaling_factor": 1.7,
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        },
    ),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM, _OPT),
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def _long_rope(original: int) -> dict[str, Any]:
    return {"original_max_position_embeddings": original} | _rope(
        "longrope",
        short_factor=[1.0 + i / 16 for i in range(8)],
        long_factor=[1.0 + i / 2 for i in range(8)],
    )


_FULL = ["full_attention"] * 3
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = _YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SLIDING = {"use_sliding_window": True, "sliding_window": 6}

TINY_MODELS = [
    TinyModel("llama", "llama"),
    TinyModel("llama-mha", "llama", {"num_key_value_heads": 4}),
    TinyModel("llama-mqa", "llama", {"num_key_value_heads": 1}),
    TinyModel("llama-tied", "llama", {"tie_word_embeddings": True}),
    TinyModel("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    TinyModel("llama-head-dim", "llama", {"head_dim": 24}),
    TinyModel("llama-odd", "llama", {"hidden_size": 60, "head_dim": 10, "rms_norm_eps": 1e-4}),
    TinyModel("llama-theta", "llama", _rope("default", rope_theta=500000.0), generates="no"),
    TinyModel("llama-linear", "llama", _rope("linear", factor=3.0), generates="no"),
    TinyModel(
        "llama-dynamic", "llama", _rope("dynamic", factor=2.0) | {"max_position_embeddings": 24}
    ),
    TinyModel("llama-llama3", "llama", _rope("llama3", **_LLAMA3)),
    TinyModel("llama-yarn", "llama", _rope("yarn", **_YARN)),
    TinyModel(
        "llama-yarn-betas",
        "llama",
        _rope("yarn", **_YARN, beta_fast=8.0, beta_slow=2.0),
        generates="no",
    ),
    TinyModel(
        "llama-yarn-mscale",
        "llama",
        _rope("yarn", **_YARN, mscale=0.8, mscale_all_dim=0.5),
        generates="no",
    ),
    TinyModel(
        "llama-yarn-attention",
        "llama",
        _rope("yarn", **_YARN, attention_factor=1.3),
        generates="no",
    ),
    TinyModel(
        "llama-yarn-untruncated", "llama", _rope("yarn", **_YARN, truncate=False), generates="no"
    ),
    TinyModel("mistral", "mistral"),
    TinyModel("mistral-full", "mistral", {"sliding_window": None}),
    TinyModel("qwen2", "qwen2"),
    TinyModel("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    TinyModel("qwen2-sliding", "qwen2", _SLIDING | {"max_window_layers": 1}),
    TinyModel(
        "qwen2-layer-types",
        "qwen2",
        _SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    TinyModel("qwen3", "qwen3"),
    TinyModel("qwen3-tied-biases", "qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    TinyModel("qwen3-sliding", "qwen3", _SLIDING | {"max_window_layers": 2}),
    TinyModel("qwen3-yarn", "qwen3", _rope("yarn", **_YARN)),
    TinyModel("phi3", "phi3", {"sliding_window": 9}, generates="pressed"),
    TinyModel("phi3-partial", "phi3", {"partial_rotary_factor": 0.75}, generates="no"),
    TinyModel("phi3-long", "phi3", _long_rope(16), generates="no"),
    TinyModel("phi3-short", "phi3", _long_rope(128), generates="no"),
    TinyModel("olmo2", "olmo2", {"attention_bias": True}, generates="pressed"),
    TinyModel("olmo3", "olmo3", generates="pressed"),
    TinyModel("smollm3", "smollm3", generates="pressed"),
    TinyModel("granite", "granite", generates="pressed"),
    TinyModel(
        "ministral3",
        "ministral3",
        _rope("yarn", **_YARN, llama_4_scaling_beta=0.3),
        generates="pressed",
    ),
    TinyModel("seed-oss", "seed_oss", generates="pressed"),
    TinyModel("exaone4", "exaone4", generates="pressed"),
    TinyModel(
        "exaone4-full", "exaone4", {"sliding_window": None, "layer_types": _FULL}, generates="no"
    ),
    TinyModel("gemma2", "gemma2", generates="pressed"),
    TinyModel("gemma3", "gemma3"),
    TinyModel("gemma3-capped", "gemma3", {"final_logit_softcapping": 2.0}, generates="no"),
    TinyModel("gemma4", "gemma4", generates="pressed"),
    TinyModel(
        "gemma4-alike",
        "gemma4",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
        generates="no",
    ),
    TinyModel(
        "gemma4-moe",
        "gemma4",
        {
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 3,
            "moe_intermediate_size": 48,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
        generates="no",
    ),
    TinyModel("glm4", "glm4", generates="pressed"),
    TinyModel("glm4-moe", "glm4_moe", generates="pressed"),
    TinyModel(
        "glm4-moe-dense-front",
        "glm4_moe",
        {
            "use_qk_norm": True,
            "attention_bias": True,
            "first_k_dense_replace": 2,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "n_group": 1,
            "topk_group": 1,
        },
        generates="no",
    ),
    TinyModel("gpt-oss", "gpt_oss", generates="pressed"),
    TinyModel("minimax-m2", "minimax_m2", generates="pressed"),
    TinyModel("mixtral", "mixtral"),
    TinyModel("qwen3-moe", "qwen3_moe", generates="pressed"),
    TinyModel(
        "qwen3-moe-some",
        "qwen3_moe",
        {"decoder_sparse_step": 2, "norm_topk_prob": False},
        generates="no",
    ),
    TinyModel("deepseek-v2", "deepseek_v2", generates="pressed"),
    TinyModel(
        "deepseek-v2-no-q-rank",
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "attention_bias": True,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
        },
        generates="no",
    ),
    TinyModel(
        "deepseek-v3",
        "deepseek_v3",
        _rope("yarn", **_YARN, mscale=1.0, mscale_all_dim=0.7),
        generates="pressed",
    ),
    TinyModel("deepseek-v3-halves", "deepseek_v3", {"rope_interleave": False}, generates="no"),
    TinyModel("glm4-moe-lite", "glm4_moe_lite", generates="pressed"),
    TinyModel("qwen3-5", "qwen3_5"),
    TinyModel(
        "qwen3-5-even",
        "qwen3_5",
        {"num_hidden_layers": 3, "linear_num_key_heads": 4, "linear_conv_kernel_dim": 3}
        | {"full_attention_interval": 2, "layer_types": None},
        generates="pressed",
    ),
    TinyModel("qwen3-5-moe", "qwen3_5_moe", generates="pressed"),
    TinyModel("qwen3-next", "qwen3_next", generates="pressed"),
    TinyModel("qwen3-next-dense", "qwen3_next", {"num_experts": 0}, generates="no"),
    TinyModel("nemotron-h", "nemotron_h"),
    TinyModel(
        "nemotron-h-experts",
        "nemotron_h",
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"]}
        | {"moe_latent_size": 24, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
        generates="no",
    ),
    TinyModel(
        "nemotron-h-other",
        "nemotron_h",
        {"layers_block_type": ["full_attention", "moe", "linear_attention"], "conv_kernel": 3}
        | {"use_conv_bias": False},
        generates="no",
    ),
    TinyModel("opt", "opt"),
    TinyModel("opt-post-norm", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    TinyModel("opt-no-bias", "opt", {"enable_bias": False}),
    TinyModel("opt-no-affine", "opt", {"layer_norm_elementwise_affine": False}),
    TinyModel("opt-no-final-norm", "opt", {"_remove_final_layer_norm": True}),
    TinyModel(
        "opt-untied-gelu", "opt", {"tie_word_embeddings": False, "activation_function": "gelu"}
    ),
    TinyModel("opt-odd", "opt", {"hidden_size": 60, "word_embed_proj_dim": 60}),
]
