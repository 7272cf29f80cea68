"""What a request may bring beside its tokens and its sampling: each acts on a slot of a worker."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.continuation import Continuation
from engine.errors import RequestError
from engine.grammar import Grammar
from engine.sampling_params import SamplingParams
from engine.thinking import ThinkingBudget


@dataclass(frozen=True, slots=True)
class Extras:
    """Of one request; the scheduler does not look at them.

    A field for each, which one table of the workers heeds (``workers.slot_tables``).
    """

    grammar: Grammar | None = None
    thinking: ThinkingBudget | None = None
    pools: bool = False

    @property
    def needs_results(self) -> bool:
        """Whether what may come next depends on all tokens before it."""
        return self.grammar is not None or self.thinking is not None


NONE = Extras()
POOLS = Extras(pools=True)


def extras_of(request: Continuation, stop_ids: Sequence[int]) -> tuple[Extras, SamplingParams]:
    """The extras that a request asks for, and its sampling parameters without them.

    Raises RequestError for what no output could match. Whether a grammar is right was found out
    before (``engine.grammar_trial``): one that is not ends its request alone.
    """
    sampling, grammar = request.sampling, None
    if sampling.structured_outputs is None and request.thinking is None:
        return NONE, sampling
    if sampling.structured_outputs is not None:
        if not stop_ids:
            raise RequestError(
                "structured_outputs needs a token that ends the output: ignore_eos must be False,"
                " or stop_token_ids must have one"
            )
        grammar = Grammar.of(sampling.structured_outputs)
    extras = Extras(grammar=grammar, thinking=request.thinking)
    return extras, replace(sampling, structured_outputs=None, thinking_token_budget=None)
