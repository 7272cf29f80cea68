"""A step's rows as recurrent layers take them."""

from functools import cached_property

import torch
from torch import Tensor

from workers.batch import Batch


class Sweep:
    """What all recurrent layers of a step share; they have as many ``taps``.

    Their convolutions read the rows end to end, each behind its last taps - 1 inputs before this
    step (its past): T + R * (taps - 1) lines in all.
    """

    def __init__(self, batch: Batch, taps: int) -> None:
        assert batch.states is not None
        self._batch, self._before = batch, taps - 1
        self.states = batch.states.long()  # [R]
        self.starts = batch.query_starts.int()  # [R + 1]

    @cached_property
    def lines(self) -> Tensor:
        """The tokens' lines [T]; where tokens are padding, any."""
        tokens = torch.arange(len(self._batch.tokens), device=self.starts.device)
        row_of = torch.bucketize(tokens, self.starts[1:], right=True)  # R of padding
        return tokens + (row_of + 1).clamp(max=len(self.states)) * self._before

    @cached_property
    def past(self) -> Tensor:
        """The lines of each row's past [R, taps - 1]."""
        rows = torch.arange(len(self.states), device=self.starts.device)
        firsts = (self.starts[:-1] + rows * self._before)[:, None]
        return firsts + torch.arange(self._before, device=self.starts.device)

    @cached_property
    def next_past(self) -> Tensor:
        """The lines of each row's past [R, taps - 1] in the next step."""
        return self.past + self.starts.diff()[:, None]

    @cached_property
    def turns(self) -> "Turns":
        """For what takes the rows side by side."""
        return Turns(self.starts, self.states)


class Turns:
    """The first tokens of all rows, then the second ones of those that have one, and so on."""

    def __init__(self, starts: Tensor, states: Tensor) -> None:
        lengths = starts.diff()
        longest_first = lengths.argsort(descending=True, stable=True)
        self.states = states[longest_first]  # [R]
        firsts, counts = starts[longest_first].tolist(), lengths[longest_first].tolist()
        self.spans: list[slice] = []  # of each turn in ``order``
        order: list[int] = []
        rows = len(counts)
        for turn in range(counts[0]):
            while counts[rows - 1] <= turn:
                rows -= 1
            self.spans.append(slice(len(order), len(order) + rows))
            order += [first + turn for first in firsts[:rows]]
        self.order = torch.tensor(order, device=starts.device)  # [T]
