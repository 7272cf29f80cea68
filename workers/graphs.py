"""Steps of fixed sizes captured as CUDA graphs, so that the host launches one thing for a step."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Size:
    """Of a step: the most rows and tokens. ``decodes``: each row has one token, and one is to be
    sampled after it."""

    rows: int
    tokens: int
    decodes: bool


def decode_sizes(most: int) -> list[int]:
    """Batch sizes worth a graph: padding costs little where the weights are what is read."""
    steps = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, most + 32, 32)]
    return sorted({min(size, most) for size in steps})


def mixed_sizes(most: int) -> list[int]:
    """Tokens of steps with prompts in them: from 16 on, an eighth to a quarter more each."""
    sizes, size = [], 16
    while size < most:
        sizes.append(size)
        size += max(16, 1 << (size.bit_length() - 3))
    return [*sizes, most] if most >= 16 else []


class Graphs:
    """The captured steps of one worker. ``capture`` them, then ``size_of`` says which one a plan
    fits and ``replay`` runs it; its result lies where it lay when it was captured."""

    def __init__(self, rows: int, most_tokens: int) -> None:
        """For steps of up to ``rows`` rows and ``most_tokens`` tokens."""
        self._decode = decode_sizes(min(rows, most_tokens)) if most_tokens else []
        self._mixed = mixed_sizes(most_tokens)
        self._rows = rows
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def sizes(self) -> list[Size]:
        """The largest first, so that the others find room in its memory."""
        mixed = (self._mixed_size(tokens) for tokens in reversed(self._mixed))
        return [*mixed, *(Size(n, n, True) for n in reversed(self._decode))]

    def _mixed_size(self, tokens: int) -> Size:
        return Size(min(self._rows, tokens), tokens, False)

    def size_of(self, plan: StepPlan) -> Size | None:
        """The captured step that ``plan`` fits, if there is one."""
        rows, tokens = len(plan.slots), plan.num_tokens
        if rows == tokens and bool(plan.wants.all()):
            at = bisect_left(self._decode, rows)
            if at < len(self._decode):
                return self._captured(Size(self._decode[at], self._decode[at], True))
        at = bisect_left(self._mixed, tokens)
        if at < len(self._mixed):
            return self._captured(self._mixed_size(self._mixed[at]))
        return None

    def _captured(self, size: Size) -> Size | None:
        return size if size in self._graphs else None

    def capture(self, sizes: Iterable[Size], run: Callable[[Size], Callable[[], Tensor]]) -> None:
        """Capture steps: ``run(size)`` prepares one and gives what computes it on the device."""
        pool = None
        for size in sizes:
            compute = run(size)
            compute()  # kernels are compiled, libraries loaded
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads (NCCL's watchdog) may go on meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = compute()
            pool = pool or graph.pool()
            self._graphs[size] = graph, result

    def __str__(self) -> str:
        """For people."""
        return (
            f"{len(self._graphs)} graphs, of decodes of {_range(self._decode)} rows and of mixed"
            f" steps of {_range(self._mixed)} tokens"
        )

    def replay(self, size: Size) -> Tensor:
        """Run the captured step; the result is overwritten by the next one."""
        graph, result = self._graphs[size]
        graph.replay()
        return result


def _range(sizes: list[int]) -> str:
    return f"{sizes[0]} to {sizes[-1]}" if sizes else "no"
