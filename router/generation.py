"""Prompts on their way through engines: tokens come, text is made of them."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from cluster.streams import Stream
from engine.collector import Collector
from engine.outcome import Outcome
from engine.outputs import Piece
from engine.sampling_params import SamplingParams
from engine.thinking import ThinkingBudget


@dataclass
class Prompt:
    """Tokens to complete, the text that they were, and what bounds the thinking after them."""

    ids: list[int]
    text: str | None = None
    thinking: ThinkingBudget | None = None


@dataclass(slots=True)
class Taken:
    """What ``Generation.read`` made, and the completions whose text reached a stop string."""

    pieces: list[Piece]
    stopped: list[int]


class Generation:
    """One prompt on its way: its stream of tokens and the text that they make.

    ``first_choice`` is the index in the answer of the first of its completions. ``model`` is the
    name of the model that runs it.
    """

    def __init__(
        self,
        collector: Collector,
        stream: Stream,
        first_choice: int,
        sampling: SamplingParams,
        model: str,
    ) -> None:
        self.stream = stream
        self.first_choice = first_choice
        self.sampling = sampling
        self.model = model
        self.output = collector.output
        self._collector = collector

    def take(self, outcomes: list[Outcome]) -> list[Piece]:
        """Take in what is ready: the pieces of it."""
        return self._collector.take(outcomes, self.stream.stop_at_text)

    def read(self, outcomes: list[Outcome]) -> Taken:
        """``take`` without telling the engine of stop strings; any thread may run it."""
        stopped: list[int] = []
        return Taken(self._collector.take(outcomes, stopped.append), stopped)

    def settle(self, taken: Taken) -> None:
        """The rest of ``take``, in the event loop."""
        for index in taken.stopped:
            self.stream.stop_at_text(index)

    def end(self) -> None:
        """Leave nothing of it behind in the engine."""
        self.stream.cancel()


async def merged(
    generations: list[Generation],
) -> AsyncIterator[tuple[Generation, list[Outcome]]]:
    """What is ready of several generations, as it comes; see ``Stream`` for what is nothing."""
    if len(generations) == 1:
        async for outcomes in generations[0].stream:
            yield generations[0], outcomes
        return
    ready: asyncio.Queue[tuple[Generation, list[Outcome] | BaseException | None]] = asyncio.Queue()

    async def read(generation: Generation) -> None:
        try:
            async for outcomes in generation.stream:
                ready.put_nowait((generation, outcomes))
            ready.put_nowait((generation, None))
        except Exception as error:
            ready.put_nowait((generation, error))

    readers = [asyncio.create_task(read(generation)) for generation in generations]
    try:
        unfinished = len(readers)
        while unfinished:
            generation, what = await ready.get()
            if isinstance(what, BaseException):
                raise what
            if what is None:
                unfinished -= 1
            else:
                yield generation, what
    finally:
        for reader in readers:
            reader.cancel()
