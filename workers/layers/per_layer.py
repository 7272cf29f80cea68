"""Per-layer embeddings (Gemma 3n and 4): a small vector of each token for each layer."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from workers import kernels
from workers.layers.embedding import VocabEmbedding
from workers.layers.linear import ReplicatedLinear
from workers.layers.norm import RMSNorm
from workers.layers.stream import Stream
from workers.parallel import Place
from workers.weights import Parameter


class PerLayerEmbedding:
    """A token's vectors [layers, size]: looked up by its id, and beside that a norm of what a
    linear layer makes of its embedding, over √2."""

    def __init__(
        self, place: Place, vocab_size: int, hidden: int, layers: int, size: int, eps: float
    ) -> None:
        self._size = size
        self._scales = [
            float(torch.tensor(scale, dtype=place.dtype))
            for scale in (size**0.5, hidden**-0.5, 0.5**0.5)
        ]
        self._tokens = VocabEmbedding(
            place, "model.embed_tokens_per_layer", vocab_size, layers * size
        )
        self._projection = ReplicatedLinear(
            place, "model.per_layer_model_projection", hidden, layers * size
        )
        self._norm = RMSNorm(place, "model.per_layer_projection_norm", size, eps)

    def parameters(self) -> Iterable[Parameter]:
        parts = (self._tokens, self._projection, self._norm)
        return chain.from_iterable(part.parameters() for part in parts)

    def __call__(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """Of tokens [T] and their embeddings [T, hidden], scaled: [T, layers, size]."""
        own, from_embedding, both = self._scales
        projected = self._projection(embedded) * from_embedding
        normed = self._norm(Stream(projected.view(-1, self._size)))
        found = self._tokens(tokens) * own
        return ((normed.view_as(found) + found) * both).view(len(tokens), -1, self._size)


class PerLayerBlock:
    """stream += norm(up(gelu(gate(stream)) · vectors)); every rank computes it whole."""

    def __init__(self, place: Place, name: str, hidden: int, size: int, eps: float) -> None:
        self._gate = ReplicatedLinear(place, f"{name}.per_layer_input_gate", hidden, size)
        self._up = ReplicatedLinear(place, f"{name}.per_layer_projection", size, hidden)
        self._norm = RMSNorm(place, f"{name}.post_per_layer_input_norm", hidden, eps)

    def parameters(self) -> Iterable[Parameter]:
        parts = (self._gate, self._up, self._norm)
        return chain.from_iterable(part.parameters() for part in parts)

    def __call__(self, stream: Stream, vectors: Tensor) -> Stream:
        """The stream behind the block; ``vectors`` [T, size] are this layer's."""
        hidden = stream.total()
        inner = kernels.gelu_mul(torch.cat((self._gate(hidden), vectors), 1))
        return Stream(hidden, self._norm(Stream(self._up(inner))))
