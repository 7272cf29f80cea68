"""A request as a value: all that it takes to run it, from its beginning or from where it was.

A new request, one that an engine was lost under, one that moves and one that is replayed are all
this. Text was made tokens before, at the edge; seeds are drawn there too, so that whoever has the
value can have it run again.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from engine.sampling_params import SamplingParams
from engine.thinking import ThinkingBudget

_MASK64 = 2**64 - 1
SYSTEM_RANDOM = random.SystemRandom()


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """``n`` completions of one prompt, and how far they have come.

    seed: of the first completion; ``child_seed`` gives the others'.
    outputs: the tokens of each completion so far, None for one that has ended; () is all of them
        from the beginning.
    bad_words: the token id sequences of ``sampling.bad_words``, which the tokenizer made.
    thinking: ``sampling.thinking_token_budget``, with how the model marks its thinking.
    priority: lower runs first, under the policy of that name.
    client: who asks, for the policy ``fair``.
    pools: no completion is wanted but the prompt's vector (``engine.pooling``).
    time_left: seconds after which it is aborted; None is never. Clocks of hosts differ.
    age: seconds since it first came to an engine, where it has left one.
    moves: engines that it has left.
    deaths: of engines that ended while they ran it, one after the other without a new token.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    seed: int
    outputs: tuple[Sequence[int] | None, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    thinking: ThinkingBudget | None = None
    priority: int = 0
    client: str = ""
    pools: bool = False
    time_left: float | None = None
    age: float = 0.0
    moves: int = 0
    deaths: int = 0

    @property
    def unfinished(self) -> list[int]:
        """The indices of the completions that have not ended."""
        outputs = self.outputs or ((),) * self.sampling.n
        return [index for index, output in enumerate(outputs) if output is not None]

    def output(self, index: int) -> Sequence[int]:
        """The tokens of a completion so far."""
        return (self.outputs[index] or ()) if self.outputs else ()


def begin(
    request_id: str,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    bad_words: Sequence[Sequence[int]] = (),
    thinking: ThinkingBudget | None = None,
    priority: int = 0,
    client: str = "",
    pools: bool = False,
    timeout: float | None = None,
    draw: random.Random = SYSTEM_RANDOM,
) -> Continuation:
    """A request from its beginning; without a seed in ``sampling`` it gets one from ``draw``."""
    return Continuation(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        seed=draw.getrandbits(64) if sampling.seed is None else sampling.seed & _MASK64,
        bad_words=tuple(map(tuple, bad_words)),
        thinking=thinking,
        priority=priority,
        client=client,
        pools=pools,
        time_left=timeout,
    )


def child_seed(seed: int, index: int) -> int:
    """The seed of completion ``index`` of a request; the first one's is the request's own.

    One round of splitmix64 (Steele, Lea and Flood, 2014) for each child.
    """
    if index == 0:
        return seed & _MASK64
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
