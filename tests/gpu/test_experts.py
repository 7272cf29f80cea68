"""Mixtures of experts on CUDA: no bit depends on the batch, and nothing on the host."""

import pytest
import torch

from workers.kernels.gpu import experts
from workers.layers.expert_products import StackedExperts
from workers.layers.experts import Experts, ExpertTraits
from workers.layers.routing import Routing
from workers.parallel import Place
from workers.products import varying

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
SHAPES = [(128, 2048, 768), (32, 2880, 2880), (8, 4096, 1792)]  # experts, hidden, inner units


def fill(layer: Experts | StackedExperts) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in layer.parameters():
        shape = parameter.shape
        parameter.fill(torch.randn(shape, generator=generator, device="cuda") / shape[-1] ** 0.5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_no_bit_depends_on_the_batch(shape: tuple[int, int, int]) -> None:
    count, hidden, inner = shape
    place = Place(torch.device("cuda", 0), torch.bfloat16)
    layer = StackedExperts(place, "experts", hidden, ExpertTraits(count, inner, Routing(4)))
    fill(layer)
    assert len(place.products) == 2 and varying(place.products) == []
    torch.manual_seed(0)
    x = torch.randn(2048, hidden, device="cuda").bfloat16()
    weights, chosen = torch.rand(2048, count, device="cuda").topk(4)
    chosen = chosen.int()
    whole = layer(x, weights, chosen, None)
    for rows in (1, 2, 7, 64, 300, 1025):
        for some in (slice(0, rows), slice(2048 - rows, 2048)):
            assert torch.equal(layer(x[some], weights[some], chosen[some], None), whole[some])


@torch.inference_mode()
def test_a_captured_step_takes_any_choice() -> None:
    place = Place(torch.device("cuda", 0), torch.bfloat16)
    layer = Experts(place, "mlp", 512, ExpertTraits(16, 256, Routing(4, normed=True)))
    fill(layer)
    x = torch.zeros(24, 512, device="cuda", dtype=torch.bfloat16)
    layer.update(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.update(x)
    for seed in range(5):
        torch.manual_seed(seed)
        x.normal_()
        graph.replay()
        assert torch.equal(y, layer.update(x))


@torch.inference_mode()
def test_products_are_those_of_plain_pytorch() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 512, device="cuda").bfloat16()
    weight = (torch.randn(16, 256, 512, device="cuda") / 20).bfloat16()
    chosen = torch.randint(0, 16, (200, 1), device="cuda").int()
    found = experts.product(x, weight, experts.sort(chosen, 0, 16, 16), 1)
    expected = torch.einsum("ti,toi->to", x.double(), weight.double()[chosen[:, 0].long()])
    assert (found - expected).norm() / expected.norm() < 4e-3
