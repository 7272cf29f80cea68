"""DeepSeek V2 and V3: latent attention, dense layers in front of others with experts."""

from dataclasses import replace
from typing import Any

from workers.checkpoint import Config
from workers.models.decoder import DecoderTraits
from workers.models.families.latents import LATENTS, check_experts, draft_layers, read_latents
from workers.models.families.moe import read_grouped, with_experts

DEEPSEEK_V2: dict[str, Any] = LATENTS | {
    "vocab_size": 102400,
    "moe_intermediate_size": 1407,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
}
DEEPSEEK_V3: dict[str, Any] = LATENTS | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}


def read_deepseek_v2(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``. Experts are chosen by the softmax, of groups by the best."""
    config = config.over(DEEPSEEK_V2)
    method = check_experts(config, "softmax", "greedy", "group_limited_greedy")
    if config.boolean("norm_topk_prob", False):
        raise config.error("norm_topk_prob", "must be false for this architecture")
    groups = {"n_group": 1, "topk_group": 1} if method == "greedy" else {}
    experts = read_grouped(Config(config.values | groups, config.source))
    routing = replace(
        experts.routing, scores="softmax", normed=False, correction=None, group_best=1
    )
    experts = replace(experts, routing=routing)
    return with_experts(read_latents(config), experts, config.whole("first_k_dense_replace", 0))


def read_deepseek_v3(config: Config) -> DecoderTraits:
    """See ``llama.read_traits``."""
    config = config.over(DEEPSEEK_V3)
    check_experts(config, "sigmoid", "noaux_tc")
    traits = replace(read_latents(config), draft_layers=draft_layers(config))
    return with_experts(traits, read_grouped(config), config.whole("first_k_dense_replace", 3))
