"""Outputs drawn at random from what a grammar allows."""

import numpy as np
from numpy.typing import NDArray

from engine.matcher import Grammars, Matcher

ENDERS = (b'"', b"}", b"]", b'"}')  # drawn more often than others, so that outputs come to an end


def allowed(grammars: Grammars, matcher: Matcher) -> NDArray[np.int64]:
    """The ids of the tokens that may come next, ``grammars.end`` among them."""
    mask = grammars.masks([matcher])[0]
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def copy_of(matcher: Matcher) -> Matcher:
    """One that goes on by itself."""
    return Matcher(matcher.inner.deep_copy())


def walk(
    grammars: Grammars, matcher: Matcher, pieces: dict[int, bytes], rng: np.random.Generator,
    most: int = 300, end: int = 30,
) -> list[int] | None:  # fmt: skip
    """The tokens of an output that ends within ``most``; None if it does not. ``end``: how
    much likelier an end is than another token."""
    output: list[int] = []
    for _ in range(most):
        ids = allowed(grammars, matcher)
        assert len(ids), (matcher.error, output)
        weights = [end if i == grammars.end else 8 if pieces[i] in ENDERS else 1 for i in ids]
        token = int(rng.choice(ids, p=np.array(weights) / sum(weights)))
        if token == grammars.end:
            return output
        output.append(token)
        assert matcher.consume([token]), matcher.error
    return None
