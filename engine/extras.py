"""What a request may bring beside its tokens and its sampling: each acts on a slot of a worker."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import RequestError
from engine.grammar import Grammar
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Extras:
    """Of one request; the scheduler does not look at them.

    A field for each, which one table of the workers heeds (``workers.slot_tables``).
    """

    grammar: Grammar | None = None
    pools: bool = False


NONE = Extras()
POOLS = Extras(pools=True)


def extras_of(sampling: SamplingParams, stop_ids: Sequence[int]) -> tuple[Extras, SamplingParams]:
    """The extras that ``sampling`` asks for, and the sampling parameters without them.

    Raises RequestError for what no output could match. Whether a grammar is right was found out
    before (``engine.grammar_trial``): one that is not ends its request alone.
    """
    if sampling.structured_outputs is None:
        return NONE, sampling
    if not stop_ids:
        raise RequestError(
            "structured_outputs needs a token that ends the output: ignore_eos must be False, or"
            " stop_token_ids must have one"
        )
    grammar = Grammar.of(sampling.structured_outputs)
    return Extras(grammar=grammar), replace(sampling, structured_outputs=None)
