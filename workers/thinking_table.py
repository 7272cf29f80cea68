"""The slots whose thinking is bounded: where the bound is reached, one token may come.

As it takes the tokens so far to know that, a sequence with a bound may not run ahead of its
results.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.plan import Admit, Ints, ints
from engine.thinking import ThinkingCount
from engine.tokenizer import Tokenizer
from workers.kernels import mask_rows
from workers.sampling_table import on_device
from workers.slot_tables import Forced, Learn


class ThinkingTable:
    """On the rank that samples. ``tokenizer`` gives that of the model, when the first comes."""

    def __init__(
        self, vocab_size: int, device: torch.device, tokenizer: Callable[[], Tokenizer]
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._tokenizer = tokenizer
        self._counts: dict[int, ThinkingCount] = {}  # by slot

    @property
    def active(self) -> bool:
        return bool(self._counts)

    def admit(self, admit: Admit) -> None:
        self.release(admit.slot)
        if (budget := admit.extras.thinking) is not None:
            encode = self._tokenizer().encode
            closings = [encode(closer, False) for closer in budget.closers]
            count = self._counts[admit.slot] = ThinkingCount(budget, min(closings, key=len))
            self._take(count, admit.tokens[admit.prompt_len :].tolist())

    def release(self, slot: int) -> None:
        self._counts.pop(slot, None)

    def warm_up(self, logits: Tensor) -> None:
        pass  # a grammar needs the same

    def on_logits(self, logits: Tensor, slots: Ints, positions: Ints) -> Learn | None:
        found = [(row, self._counts.get(slot)) for row, slot in enumerate(slots.tolist())]
        rows = [(row, count) for row, count in found if count is not None]
        if not rows:
            return None
        forced = [(row, count.forced) for row, count in rows if count.forced is not None]
        if forced:
            masks = np.zeros((len(forced), -(-self._vocab_size // 32)), np.uint32)
            for at, (_, token) in enumerate(forced):
                if token < self._vocab_size:  # else none can come: the sequence ends with an error
                    masks[at, token // 32] = 1 << token % 32
            only = on_device(ints([row for row, _ in forced]), self._device)
            mask_rows(logits, only, on_device(masks.view(np.int32), self._device))

        def learn(tokens: Ints, others: Forced) -> Forced:
            for row, count in rows:
                self._take(count, [int(tokens[row]), *others.get(row, ())])
            return {}

        return learn

    def _take(self, count: ThinkingCount, tokens: Sequence[int]) -> None:
        for text in self._tokenizer().token_texts(tokens):
            count.take(text.bytes)
