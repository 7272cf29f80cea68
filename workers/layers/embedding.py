"""Embeddings and the output layer, split by rows of the vocabulary over the group."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.memory import weight_tensor
from workers.layers.linear import Packed
from workers.parallel import Place
from workers.weights import Parameter


class VocabEmbedding:
    """Token embeddings; each rank looks up its rows and the group sums."""

    def __init__(self, place: Place, name: str, vocab_size: int, size: int) -> None:
        self._group = place.group
        self._rows = place.group.split(vocab_size, "vocab_size")
        shape = self._rows.stop - self._rows.start, size
        self.weight = weight_tensor(shape, place.dtype, place.device)
        self._on_filled: list[Packed] = []
        self._parameters = [
            Parameter(
                f"{name}.weight",
                (vocab_size, size),
                self.weight,
                (self._rows, slice(None)),
                self._filled,
            )
        ]

    def _filled(self, weight: Tensor) -> None:
        for product in self._on_filled:
            product.ready(weight, keep=True)

    def tied_product(self) -> Packed:
        """The product of an output layer that shares this weight."""
        product = Packed(self.weight, None)
        self._on_filled.append(product)
        return product

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, tokens: Tensor) -> Tensor:
        if self._group.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self._rows.start
        other = (local < 0) | (local >= self.weight.shape[0])
        found = F.embedding(local.masked_fill(other, 0), self.weight)
        return self._group.all_reduce(found.masked_fill_(other[:, None], 0))


class OutputLayer:
    """Hidden rows [n, H] to logits [n, vocab_size], in the model's type, gathered on rank 0 of the
    group; the others get their share of the vocabulary.

    ``tied`` is the embedding of the same stage whose weight it shares; without one it reads
    tensor ``name``, which for tied weights on another stage is the embedding's.
    """

    def __init__(
        self, place: Place, name: str, vocab_size: int, size: int, tied: VocabEmbedding | None
    ) -> None:
        self._group = place.group
        self._parameters: list[Parameter] = []
        if tied is not None:
            self._product = tied.tied_product()
            place.add_product(name, tied.weight)
            return
        rows = place.group.split(vocab_size, "vocab_size")
        rounder = place.rounder([name])
        weight = place.weight([name], rows.stop - rows.start, size, rounder=rounder)
        self._product = Packed(weight, None, rounder=rounder)
        self._parameters = place.stored(
            Parameter(
                f"{name}.weight",
                (vocab_size, size),
                weight,
                (rows, slice(None)),
                self._product.ready,
                self._product.packs,
            ),
            rounder,
        )

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._group.gather(self._product(hidden))


class LabelLayer:
    """A classifier's head without bias: vectors [m, H] float32 to [m, labels], in float32. Every
    rank computes it whole, row by row."""

    def __init__(self, place: Place, name: str, size: int, labels: int) -> None:
        shape = (labels, size)
        self._weight = place.floats(labels, size)
        self._parameters = [Parameter(f"{name}.weight", shape, self._weight)]

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, vectors: Tensor) -> Tensor:
        return (vectors[:, None] * self._weight).sum(-1)


class PositionEmbedding:
    """Learned positions; row p + ``offset`` is position p. Every rank holds them whole."""

    def __init__(self, place: Place, name: str, positions: int, offset: int, size: int) -> None:
        shape = (positions + offset, size)
        self._table = torch.empty(shape, dtype=place.dtype, device=place.device)
        self._offset = offset
        self._parameters = [Parameter(f"{name}.weight", shape, self._table)]

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self._table[self._offset :])
