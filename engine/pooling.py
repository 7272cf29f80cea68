"""Vectors in place of tokens: how an engine pools, and what a client makes of what it gets.

A pooling request is a prompt without a completion. It ends with its prefill and brings the hidden
states pooled to one vector or, of a classifier, its logit. Both are raw: a client cuts, normalises
or squashes them, so that an engine has to know of nothing but that it pools.
"""

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError, shown
from engine.sampling_params import SamplingParams
from engine.values import whole

Vector = NDArray[np.float32]
Method = Literal["last", "mean", "cls"]
T = TypeVar("T")

NO_SAMPLING = SamplingParams(max_tokens=1, detokenize=False)  # of a request without a completion


@dataclass(frozen=True)
class Pooling:
    """How an engine pools. ``method``: the hidden state of the last token, of the first (cls), or
    the mean of all.

    scores: the vector is what a classifier says of the prompt, not an embedding.
    tokens: of a model that generates the score is the logit of the first of these after the
        prompt, less that of the second, if there is one.
    activates: embeddings get the length 1, scores become probabilities, unless a request says no.
    """

    method: Method
    scores: bool = False
    tokens: tuple[int, ...] = ()
    activates: bool = True


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """What a request asks of its vector.

    dimensions: only so many leading values, for models that were trained so (Matryoshka
        embeddings); None is all.
    use_activation: embeddings of length 1, scores as probabilities; None is what the checkpoint
        says.

    Raises RequestError, naming the field, for a wrong value.
    """

    dimensions: int | None = None
    use_activation: bool | None = None

    def __post_init__(self) -> None:
        number = whole(self.dimensions)
        if self.dimensions is not None and (number is None or number < 1):
            raise RequestError(
                f"dimensions must be an integer of at least 1 or None, got {shown(self.dimensions)}"
            )
        if not isinstance(self.use_activation, bool | None):
            raise RequestError(
                f"use_activation must be True, False or None, got {shown(self.use_activation)}"
            )

    def check(self, pooling: Pooling | None, vector_size: int, scores: bool) -> None:
        """Raises RequestError if a model that pools so cannot give it. ``scores``: what is asked
        for is a score, not an embedding."""
        if pooling is None:
            raise RequestError(
                "the model makes no vectors: it is no embedding model; the option pooling (last,"
                " mean or cls) makes one of it"
            )
        if pooling.scores != scores:
            there, asked = ("scores", "embeddings") if pooling.scores else ("embeddings", "scores")
            raise RequestError(f"the model gives {there}, no {asked}")
        if self.dimensions is not None and (scores or self.dimensions > vector_size):
            allowed = "None for scores" if scores else f"at most {vector_size}"
            raise RequestError(f"dimensions must be {allowed}, got {self.dimensions}")

    def finish(self, pooling: Pooling, vector: Vector) -> Vector:
        """What the client gets of a raw vector [V]: float32, [dimensions or V]."""
        activates = pooling.activates if self.use_activation is None else self.use_activation
        vector = vector[: self.dimensions]
        if not activates:
            return vector
        if pooling.scores:
            return np.float32(0.5) * (1 + np.tanh(vector / 2))  # the logistic function
        length = np.sqrt(np.square(vector, dtype=np.float64).sum())
        return np.asarray(vector / max(length, 1e-12), np.float32)


@dataclass(slots=True)
class EmbeddingOutput:
    """``embedding``: the vector, as floats."""

    embedding: list[float]


@dataclass(slots=True)
class ScoringOutput:
    """``score``: how well two texts go together, as a rule a probability."""

    score: float


@dataclass(slots=True)
class PoolingRequestOutput(Generic[T]):
    """A prompt and what became of it: ``outputs`` is an EmbeddingOutput or a ScoringOutput.

    ``num_cached_tokens`` of the prompt's came from the prefix cache.
    """

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True
