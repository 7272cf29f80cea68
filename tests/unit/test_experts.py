"""Routing and the experts' layer against the modules of transformers."""

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from workers.layers.experts import Experts, ExpertTraits, SharedExpert
from workers.layers.routing import Router, Routing
from workers.parallel import Place

PLACE = Place(torch.device("cpu"), torch.float32)
HIDDEN, COUNT, CHOSEN = 32, 16, 3
GROUPS = {"n_group": 4, "topk_group": 2}
ROUTERS = {
    "deepseek-v3": (
        DeepseekV3TopkRouter,
        transformers.DeepseekV3Config(routed_scaling_factor=2.5, **GROUPS),
        Routing(
            CHOSEN,
            "sigmoid",
            normed=True,
            scale=2.5,
            precise=True,
            correction="gate.e_score_correction_bias",
            groups=4,
            chosen_groups=2,
        ),
    ),
    "deepseek-v2": (
        DeepseekV2TopkRouter,
        transformers.DeepseekV2Config(
            routed_scaling_factor=1.5, topk_method="group_limited_greedy", **GROUPS
        ),
        Routing(CHOSEN, scale=1.5, precise=True, groups=4, chosen_groups=2, group_best=1),
    ),
    "gpt-oss": (
        GptOssTopKRouter,
        transformers.GptOssConfig(),
        Routing(CHOSEN, "chosen", name="router", bias=True),
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fill(layer: Router | Experts, tensors: dict[str, Tensor], name: str) -> None:
    """``tensors`` of transformers' module, under ``name``, are all that the layer has."""
    parameters = {parameter.name: parameter for parameter in layer.parameters()}
    assert parameters.keys() == {f"{name}.{key}" for key in tensors}
    for key, tensor in tensors.items():
        parameters[f"{name}.{key}"].fill(tensor)


def noise(module: torch.nn.Module) -> None:
    for tensor in module.state_dict().values():
        tensor.normal_(0, 0.3)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_token_goes_where_transformers_sends_it(name: str) -> None:
    kind, config, routing = ROUTERS[name]
    config.hidden_size, config.num_experts_per_tok = HIDDEN, CHOSEN
    config.n_routed_experts = config.num_local_experts = config.num_experts = COUNT
    theirs = kind(config)
    noise(theirs)
    ours = Router(PLACE, "mlp", HIDDEN, COUNT, routing)
    fill(ours, dict(theirs.state_dict()), f"mlp.{routing.name}")
    x = torch.randn(50, HIDDEN)
    weights, chosen = ours(x)
    with torch.no_grad():
        _, expected, places = theirs(x)
    dense = torch.zeros(50, COUNT).scatter(1, chosen, weights)
    torch.testing.assert_close(dense, torch.zeros(50, COUNT).scatter(1, places, expected))


def test_a_shared_expert_may_have_a_gate() -> None:
    config = transformers.Qwen3NextConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=COUNT,
        num_experts_per_tok=CHOSEN,
    )
    theirs = Qwen3NextSparseMoeBlock(config)
    noise(theirs)
    shared = SharedExpert(40, "shared_expert", "shared_expert_gate")
    traits = ExpertTraits(COUNT, 24, Routing(CHOSEN, normed=config.norm_topk_prob), shared)
    ours = Experts(PLACE, "mlp", HIDDEN, traits)
    tensors = dict(theirs.state_dict())
    gate_up, down = tensors.pop("experts.gate_up_proj"), tensors.pop("experts.down_proj")
    for i in range(COUNT):
        gate, up = gate_up[i].chunk(2)
        tensors |= {
            f"experts.{i}.gate_proj.weight": gate,
            f"experts.{i}.up_proj.weight": up,
            f"experts.{i}.down_proj.weight": down[i],
        }
    fill(ours, tensors, "mlp")
    x = torch.randn(1, 50, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(ours.update(x[0]), theirs(x)[0])
