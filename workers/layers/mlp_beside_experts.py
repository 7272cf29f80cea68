"""A gated MLP and experts side by side, each with norms of its own (Gemma 4)."""

from collections.abc import Iterable
from itertools import chain

from torch import Tensor

from workers.layers.experts import Experts, ExpertTraits
from workers.layers.linear import Gate
from workers.layers.mlp import GatedMLP
from workers.layers.norm import RMSNorm
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.weights import Parameter


class MLPBesideExperts:
    """norm(mlp(norm(x))) + norm(experts(norm(x))) of the residual stream x itself. What the router
    sees is another norm of it, over √hidden."""

    def __init__(
        self,
        place: Place,
        name: str,
        hidden: int,
        inner: int,
        activation: Gate,
        eps: float,
        experts: ExpertTraits,
    ) -> None:
        self._mlp = GatedMLP(place, f"{name}.mlp", hidden, inner, False, activation)
        self._experts = Experts(place, name, hidden, experts)
        before, after = f"{name}.pre_feedforward_layernorm", f"{name}.post_feedforward_layernorm"
        self._before, self._before_experts, self._after, self._after_experts, self._routed = (
            RMSNorm(place, norm, hidden, eps)
            for norm in (before, f"{before}_2", f"{after}_1", f"{after}_2", f"{name}.router.norm")
        )
        self._router_scale = hidden**-0.5

    def parameters(self) -> Iterable[Parameter]:
        norms = (self._before, self._before_experts, self._after, self._after_experts, self._routed)
        return chain.from_iterable(p.parameters() for p in (self._mlp, self._experts, *norms))

    def __call__(self, x: Tensor, residual: Tensor) -> Stream:
        return Stream(residual, self.update(x))

    def update(self, x: Tensor) -> Tensor:
        """What is added to the residual stream x [T, hidden], before the layer's last norm."""
        stream = Stream(x)
        dense = self._mlp.update(self._before(stream))
        routed = self._routed(stream) * self._router_scale
        sparse = self._experts.update(self._before_experts(stream), routed)
        return self._after(Stream(dense)) + self._after_experts(Stream(sparse))
