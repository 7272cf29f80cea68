"""Which experts a token goes to, and what the output of each weighs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from workers import kernels
from workers.layers.linear import ReplicatedLinear
from workers.parallel import Place
from workers.weights import Parameter

LEAST_SUM = 1e-20  # that weights are divided by, as DeepSeek V3 has it


@dataclass(frozen=True)
class Routing:
    """``chosen`` experts for each token, by the logits of the linear layer ``name``, which may have
    a ``bias`` and is computed in float32 if it is ``precise``.

    ``scores`` are the "softmax" over all experts or the "sigmoid" of each, and those with the
    highest are chosen; or ("chosen") the highest logits are, and the softmax is over these alone
    (gpt-oss). Weights are the scores, divided by their sum if ``normed``, times ``scale``.

    ``correction`` is a vector of the checkpoint that is added to the scores for the choice alone.
    Of ``groups`` of experts side by side only those in ``chosen_groups`` of them can be chosen:
    where the ``group_best`` highest scores have the greatest sum (DeepSeek V3, arXiv 2412.19437).
    ``expert_scales`` is a vector of the checkpoint by which the weights are multiplied (Gemma 4).
    """

    chosen: int
    scores: Literal["softmax", "sigmoid", "chosen"] = "softmax"
    normed: bool = False
    scale: float = 1.0
    name: str = "gate"
    bias: bool = False
    precise: bool = False
    correction: str | None = None
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 2
    expert_scales: str | None = None


class Router:
    """x [T, hidden] to the weights, float32, and numbers of each token's experts, both
    [T, chosen], the first choice first. Every rank computes it whole."""

    def __init__(
        self, place: Place, name: str, hidden: int, experts: int, routing: Routing
    ) -> None:
        self._routing = routing
        precise = replace(place, dtype=torch.float32)
        self._dtype = torch.float32 if routing.precise else place.dtype
        self._linear = ReplicatedLinear(
            precise if routing.precise else place,
            f"{name}.{routing.name}",
            hidden,
            experts,
            routing.bias,
            late_bias=True,
        )
        self._fused = kernels.has_triton(place.device)
        self._correction: Tensor | None = None
        self._parameters = list(self._linear.parameters())
        if routing.correction is not None:
            self._correction = place.floats(experts)
            self._parameters.append(
                Parameter(f"{name}.{routing.correction}", (experts,), self._correction)
            )
        self._scales: Tensor | None = None
        if routing.expert_scales is not None:
            self._scales = place.floats(experts)
            self._parameters.append(
                Parameter(f"{name}.{routing.expert_scales}", (experts,), self._scales)
            )

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self._route(x)
        return weights if self._scales is None else weights * self._scales[chosen], chosen

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, rule = self._linear(x.to(self._dtype)), self._routing
        if not self._fused:
            return route(logits.float(), rule, self._correction)
        from workers.kernels.gpu import routing

        return routing.route(
            logits,
            self._linear.late_bias,
            self._correction,
            chosen=rule.chosen,
            scores=rule.scores,
            normed=rule.normed,
            least_sum=LEAST_SUM,
            scale=rule.scale,
            groups=rule.groups,
            chosen_groups=rule.chosen_groups,
            group_best=rule.group_best,
        )


def route(
    logits: Tensor, routing: Routing, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the experts chosen, [T, chosen], by logits [T, experts], float32."""
    if routing.scores == "chosen":
        best, chosen = logits.topk(routing.chosen)
        return best.softmax(-1) * routing.scale, chosen
    scores = kernels.sigmoid(logits) if routing.scores == "sigmoid" else logits.softmax(-1)
    ranked = scores if correction is None else scores + correction
    if routing.groups > 1:
        ranked = _within_groups(ranked, routing)
    chosen = ranked.topk(routing.chosen).indices
    weights = scores.gather(1, chosen)
    if routing.normed:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
    return weights * routing.scale, chosen


def _within_groups(ranked: Tensor, routing: Routing) -> Tensor:
    """``ranked`` [T, experts] with -inf for the experts of groups that are not chosen."""
    grouped = ranked.view(len(ranked), routing.groups, -1)
    sums = grouped.topk(routing.group_best).values.sum(-1)
    allowed = torch.zeros_like(sums, dtype=torch.bool)
    allowed.scatter_(1, sums.topk(routing.chosen_groups).indices, True)
    return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
