"""The Triton kernels of mixtures of experts, against plain PyTorch: by Triton's interpreter where
there is no GPU (tests/conftest.py), compiled where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.triton_launches import launches, where_triton_compiles
from workers.kernels.gpu import experts, routing
from workers.layers.expert_products import LoopedExperts, StackedExperts
from workers.layers.experts import ClampedGate, ExpertTraits
from workers.layers.routing import LEAST_SUM, Routing, route
from workers.parallel import Group, Place

Clamp = tuple[float, float]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUTINGS = {
    "softmax": Routing(3),
    "normed": Routing(4, normed=True),
    "chosen": Routing(3, "chosen", bias=True),
    "corrected": Routing(3, "sigmoid", normed=True, scale=2.5, correction="c"),
    "groups": Routing(3, "sigmoid", correction="c", groups=4, chosen_groups=2),
    "best-of-groups": Routing(2, groups=3, chosen_groups=2, group_best=1),
    "one": Routing(1),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def on_gpu(
    logits: Tensor, routing_: Routing, bias: Tensor | None, correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    return routing.route(
        logits, bias, correction, chosen=routing_.chosen, scores=routing_.scores,
        normed=routing_.normed, least_sum=LEAST_SUM, scale=routing_.scale, groups=routing_.groups,
        chosen_groups=routing_.chosen_groups, group_best=routing_.group_best,
    )  # fmt: skip


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("count", [12, 24])
def test_tokens_go_where_they_go_without_a_gpu(name: str, count: int) -> None:
    rule = ROUTINGS[name]
    logits = normal(9, count)
    bias = normal(count) if rule.bias else None
    correction = normal(count) if rule.correction else None
    weights, chosen = on_gpu(logits, rule, bias, correction)
    expected = route(logits if bias is None else logits + bias, rule, correction)
    assert torch.equal(chosen.long(), expected[1])
    torch.testing.assert_close(weights, expected[0])


def test_of_equal_scores_the_lower_number_is_chosen() -> None:
    logits = torch.zeros(2, 12, device=DEVICE)
    logits[1, 7] = 1
    _, chosen = on_gpu(logits, Routing(3), None, None)
    assert chosen.tolist() == [[0, 1, 2], [7, 0, 1]]


class Layer:
    """Experts and tokens whose choice is uneven: expert 1 gets none, expert 5 most."""

    count, hidden, inner, each = 6, 80, 96, 3

    def __init__(self, tokens: int, bias: bool) -> None:
        self.x = normal(tokens, self.hidden)
        self.gate_up = normal(self.count, 2 * self.inner, self.hidden) / 9
        self.down = normal(self.count, self.hidden, self.inner) / 9
        self.biases = (normal(self.count, 2 * self.inner), normal(self.count, self.hidden))
        self.bias = bias
        scores = torch.rand(tokens, self.count, device=DEVICE) * torch.arange(6, device=DEVICE)
        scores[:, 1] = -1
        self.weights, chosen = scores.topk(self.each)
        self.chosen = chosen.int()
        self.shared = normal(tokens, self.hidden)

    def on_gpu(self, clamp: Clamp | None, mine: slice, tokens: slice = slice(None)) -> Tensor:
        chosen, held = self.chosen[tokens].contiguous(), mine.stop - mine.start
        order = experts.sort(chosen, mine.start, held, self.count)
        biases = [bias[mine] if self.bias else None for bias in self.biases]
        inner = experts.product(
            self.x[tokens], self.gate_up[mine], order, self.each, biases[0], gated=True, clamp=clamp
        )
        y = experts.product(inner, self.down[mine], order, 1, biases[1])
        weights = self.weights[tokens].contiguous()
        return experts.combine(y, weights, chosen, mine.start, held, self.shared[tokens])

    def expected(self, clamp: Clamp | None, mine: slice) -> Tensor:
        """Every expert of every token, and then those that were chosen."""
        y = torch.einsum("ti,eoi->teo", self.x.double(), self.gate_up.double())
        gate, up = (y + self.biases[0] if self.bias else y).chunk(2, -1)
        if clamp:
            gate, up = gate.clamp(max=clamp[1]), up.clamp(-clamp[1], clamp[1]) + 1
        inner = gate * torch.sigmoid(gate * (clamp[0] if clamp else 1)) * up
        y = torch.einsum("tei,eoi->teo", inner, self.down.double())
        y = y + self.biases[1] if self.bias else y
        weights = torch.zeros(len(y), self.count, dtype=torch.double, device=DEVICE)
        weights.scatter_(1, self.chosen.long(), self.weights.double())
        return self.shared + torch.einsum("te,teo->to", weights[:, mine], y[:, mine])


@pytest.mark.parametrize(
    ("tile", "bias", "clamp", "mine"),
    [
        (0, False, None, slice(0, 6)),
        (0, True, (1.7, 1.0), slice(0, 6)),
        (1, True, None, slice(3, 6)),
        (2, False, (1.7, 1.0), slice(0, 3)),
        (3, True, None, slice(0, 6)),
    ],
)
def test_experts_are_those_of_the_formula(
    tile: int, bias: bool, clamp: Clamp | None, mine: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_TILES", experts._TILES[tile : tile + 1])
    layer = Layer(15, bias)
    found = layer.on_gpu(clamp, mine)
    torch.testing.assert_close(found.double(), layer.expected(clamp, mine), rtol=0, atol=3e-5)
    alone = layer.on_gpu(clamp, mine, slice(7, 8))
    torch.testing.assert_close(alone[0], found[7], rtol=0, atol=1e-5)


def test_pairs_are_sorted_by_expert() -> None:
    chosen = torch.randint(0, 20, (200, 4), device=DEVICE, dtype=torch.int32)
    order = experts.sort(chosen, 5, 10, 20)
    assert order.starts[0] == 0
    for e in range(10):
        found = order.pairs[order.starts[e] : order.starts[e + 1]]
        assert torch.equal(found.long(), (chosen.flatten() == 5 + e).nonzero()[:, 0])


@pytest.mark.parametrize(
    ("expert_parallel", "traits"),
    [
        (False, ExpertTraits(4, 32, Routing(2), gate=ClampedGate(1.7, 1.0), bias=True)),
        (True, ExpertTraits(4, 32, Routing(2), gate=ClampedGate(1.7, 1.0), bias=True)),
        (False, ExpertTraits(4, 32, Routing(2), activation="gelu_tanh")),
        (True, ExpertTraits(4, 32, Routing(2), gated=False, bias=True)),
    ],
)
def test_ranks_add_up_to_what_one_computes_without_a_gpu(
    expert_parallel: bool, traits: ExpertTraits
) -> None:
    values: dict[str, Tensor] = {}

    def build(kind: type[StackedExperts] | type[LoopedExperts], group: Group) -> Any:
        layer = kind(Place(DEVICE, torch.float32, group, expert_parallel), "experts", 24, traits)
        for parameter in layer.parameters():
            whole = values.setdefault(parameter.name, torch.randn(parameter.shape) / 4)
            parameter.fill(whole[parameter.cut])
        return layer

    x, weights = normal(5, 24), torch.rand(5, 2, device=DEVICE)
    chosen = torch.tensor([[0, 3], [3, 1], [2, 0], [1, 2], [3, 0]], device=DEVICE).int()
    whole = build(LoopedExperts, Group())(x, weights, chosen.long(), None)
    ranks = [build(StackedExperts, Group(2, rank)) for rank in range(2)]
    total = sum(rank(x, weights, chosen, None) for rank in ranks)
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


def compile_all(arch: int, dtype: torch.dtype) -> list[str]:
    """The names of the kernels that a layer takes, compiled."""
    layer = StackedExperts(
        Place(torch.device("cpu"), dtype),
        "experts",
        256,
        ExpertTraits(8, 128, Routing(2), gate=ClampedGate(1.7, 7.0), bias=True),
    )
    with launches() as found:
        weights, chosen = on_gpu(torch.zeros(3, 8), ROUTINGS["groups"], None, torch.zeros(8))
        layer(torch.zeros(3, 256, dtype=dtype), weights, chosen, None)
    variants = {launch.variant: launch for launch in found}
    return [variant.compile(arch).metadata.name for variant in variants.values()]


def test_the_kernels_compile() -> None:
    with where_triton_compiles() as call:
        names = call(compile_all, 90, torch.bfloat16)
    assert names == ["_route", "_sort", "_product", "_product", "_combine"]
