"""Grammars of the slots: which tokens may come next, as masks on the logits.

Masks are made in threads of their own, as soon as a token is on the host: while results travel and
the next step computes. A step waits for what is not ready. So a sequence with a grammar may not run
ahead of its results.

A token to which the grammar leaves no alternative is not sampled: it goes up with the one before
it. It is what would have been sampled, for its mask would have allowed nothing else.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.errors import MantaError
from engine.log import get_logger
from engine.matcher import Grammars, Masks, Matcher
from engine.plan import Admit, Ints, ints
from workers.kernels import mask_rows
from workers.sampling_table import on_device
from workers.slot_tables import Forced, Learn

log = get_logger("grammar")

MOST_FORCED = 1024  # tokens that llguidance may write for a row in a step


def _forces(admit: Admit) -> bool:
    """Whether tokens need no sampling if the grammar allows no others: nobody asks for their
    log-probabilities, and nothing else forbids them."""
    return admit.sampling.logprobs is None and not admit.bad_words


class _Output:
    """The grammar of one slot's sequence, and how far the output has come in it."""

    def __init__(self, admit: Admit, words: int, vocab_size: int) -> None:
        self.name = admit.name
        self.known = len(admit.tokens)  # up to where, in prompt and output, the grammar has come
        self.matcher: Matcher | None = None  # None: there is no going on
        self.mask: Masks = np.zeros(words, np.int32)  # of the token at position ``known``
        self.stops = frozenset(admit.stop_ids)
        stop_ids = np.array(admit.stop_ids, np.int32)
        self._words = stop_ids // 32
        self._bits = np.int32(1) << stop_ids % 32
        self._vocab_size = vocab_size
        self._most_forced = MOST_FORCED if _forces(admit) else 0
        self.ready: Future[None]

    def learn(self, token: int) -> list[int] | None:
        """Take the token that was sampled, and those that it forces: these; None if nothing comes
        after it."""
        self.known += 1
        if self.matcher is None or token in self.stops:
            return None
        if not self.matcher.consume([token]):
            return []
        forced: list[int] = []
        most = self._most_forced
        while most > 0 and (run := self.matcher.forced_tokens()):
            # Its mask would allow the first alone. What comes after it is asked for again, as it
            # is for a mask: tokens are written anew from where the output has come to.
            most -= len(run)
            first = run[0]
            if first >= self._vocab_size or first in self.stops:
                break
            forced.append(first)
            if not self.matcher.consume([first]):
                break
        self.known += len(forced)
        return forced

    def take(self, mask: Masks, end: int) -> None:
        """The next token's mask as a matcher makes it, whose bit ``end`` says whether the output
        may end: end tokens may come there, and nowhere else."""
        ends = mask[end // 32] >> (end % 32) & 1
        np.bitwise_and.at(mask, self._words, ~self._bits)
        if ends:
            np.bitwise_or.at(mask, self._words, self._bits)
        self.mask = mask[: len(self.mask)]

    def fail(self, why: str) -> None:
        """No token may come: the sampler finds none, and the sequence ends with an error."""
        log.error("%s: the grammar can go no further: %s", self.name, why)
        self.matcher, self.mask = None, np.zeros_like(self.mask)


class GrammarTable:
    """On the rank that samples. ``grammars`` loads what compiles them, when the first comes."""

    def __init__(
        self, vocab_size: int, device: torch.device, grammars: Callable[[], Grammars]
    ) -> None:
        self._vocab_size, self._words = vocab_size, -(-vocab_size // 32)
        self.device = device
        self._load = grammars
        self._outputs: dict[int, _Output] = {}  # by slot

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(2, "manta-grammar")

    @property
    def active(self) -> bool:
        return bool(self._outputs)

    def admit(self, admit: Admit) -> None:
        self.release(admit.slot)
        if admit.extras.grammar is not None:
            output = self._outputs[admit.slot] = _Output(admit, self._words, self._vocab_size)
            output.ready = self._threads.submit(self._begin, output, admit)

    def release(self, slot: int) -> None:
        self._outputs.pop(slot, None)

    def on_logits(self, logits: Tensor, slots: Ints, positions: Ints) -> Learn | None:
        found = [(row, self._outputs.get(slot)) for row, slot in enumerate(slots.tolist())]
        rows = [(row, output) for row, output in found if output is not None]
        if not rows:
            return None
        for row, output in rows:
            output.ready.result()
            assert output.known == positions[row], "a sequence with a grammar ran ahead"
        masks = np.stack([output.mask for _, output in rows])
        self._mask(logits, ints([row for row, _ in rows]), masks)

        return lambda tokens, _: self._learn(rows, tokens)

    def warm_up(self, logits: Tensor) -> None:
        self._mask(logits, ints([0]), np.full((1, self._words), -1, np.int32))
        self._threads.submit(self._load)

    def _learn(self, rows: Sequence[tuple[int, _Output]], tokens: Ints) -> Forced:
        found = [(row, output, output.learn(int(tokens[row]))) for row, output in rows]
        going = [output for _, output, forced in found if forced is not None]
        ready = self._threads.submit(lambda: self._next(self._load(), going))
        for output in going:
            output.ready = ready
        return {row: forced for row, _, forced in found if forced}

    def _mask(self, logits: Tensor, rows: Ints, masks: Masks) -> None:
        mask_rows(logits, on_device(rows, self.device), on_device(masks, self.device))

    # ---- in the threads ----

    def _begin(self, output: _Output, admit: Admit) -> None:
        grammar = admit.extras.grammar
        assert grammar is not None
        try:
            grammars = self._load()
            output.matcher = grammars.matcher(grammar)
        except MantaError as error:  # it was tried before; but this may be another machine
            return output.fail(str(error))
        output.matcher.consume(admit.tokens[admit.prompt_len :].tolist())
        self._next(grammars, [output])

    def _next(self, grammars: Grammars, outputs: Sequence[_Output]) -> None:
        matchers = [output.matcher for output in outputs if output.matcher is not None]
        for output, mask in zip(outputs, grammars.masks(matchers), strict=True):
            assert output.matcher is not None
            if error := output.matcher.error:
                output.fail(error)
            else:
                output.take(mask, grammars.end)
