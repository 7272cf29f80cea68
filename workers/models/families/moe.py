"""What the configs of mixtures of experts say alike."""

from dataclasses import replace

from workers.checkpoint import Config
from workers.layers.experts import ExpertTraits, SharedExpert
from workers.layers.routing import Routing
from workers.models.decoder import DecoderTraits


def read_chosen(config: Config, count: int) -> int:
    """How many of ``count`` experts that can be chosen a token gets. Raises CheckpointError for
    more than all."""
    chosen = config.integer("num_experts_per_tok")
    if chosen > count:
        raise config.error(
            "num_experts_per_tok", f"must be at most the number of experts to choose from, {count}"
        )
    return chosen


def read_grouped(config: Config) -> ExpertTraits:
    """Experts chosen by the sigmoid, within groups, with shared ones beside them (DeepSeek V3).

    Raises CheckpointError, naming the field, where the groups do not add up.
    """
    count, inner = config.integer("n_routed_experts"), config.integer("moe_intermediate_size")
    groups = config.integer("n_group", 1)
    if count % groups or (groups > 1 and count // groups < 2):
        message = f"must cut n_routed_experts ({count}) into groups of 2 or more"
        raise config.error("n_group", message)
    chosen_groups = config.integer("topk_group", 1)
    if chosen_groups > groups:
        raise config.error("topk_group", f"must be at most n_group ({groups})")
    routing = Routing(
        read_chosen(config, count // groups * chosen_groups),
        scores="sigmoid",
        normed=config.boolean("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
        precise=True,
        correction="gate.e_score_correction_bias",
        groups=groups,
        chosen_groups=chosen_groups,
    )
    shared = config.whole("n_shared_experts", 0)
    return ExpertTraits(count, inner, routing, SharedExpert(shared * inner) if shared else None)


def with_experts(traits: DecoderTraits, experts: ExpertTraits, dense: int = 0) -> DecoderTraits:
    """``traits`` with ``experts`` in all layers but the first ``dense``."""
    layers = (
        layer if i < dense else replace(layer, experts=experts)
        for i, layer in enumerate(traits.layers)
    )
    return replace(traits, layers=tuple(layers))
