"""Prompts on their way through an engine: tokens come, text is made of them."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from cluster.client import RequestStream
from engine.engine import Delta
from engine.output import RequestText
from engine.outputs import CompletionOutput
from router.balance import Ticket


@dataclass
class Prompt:
    """Tokens to complete, and the text that they were."""

    ids: list[int]
    text: str | None = None


@dataclass(slots=True)
class Piece:
    """What one wake-up brought for one completion. Its new tokens are those from ``start`` on."""

    output: CompletionOutput
    start: int
    text: str


@dataclass(slots=True)
class Taken:
    """What ``Generation.read`` made, and the completions whose text reached a stop string."""

    pieces: list[Piece]
    stopped: list[int]


class Generation:
    """One prompt on its way: its stream of tokens and the text that they make.

    ``first_choice`` is the index in the answer of the first of its completions.
    """

    def __init__(
        self, text: RequestText, stream: RequestStream, ticket: Ticket, first_choice: int
    ) -> None:
        self.stream = stream
        self.first_choice = first_choice
        self.output = text.output
        self._text = text
        self._ticket = ticket

    def take(self, deltas: list[Delta]) -> list[Piece]:
        """Take in what is ready: one piece for each completion that it belongs to."""
        taken = self.read(deltas)
        self.settle(taken)
        return taken.pieces

    def read(self, deltas: list[Delta]) -> Taken:
        """The first half of ``take``, which only makes text; any thread may run it."""
        pieces: dict[int, Piece] = {}
        stopped: list[int] = []
        for delta in deltas:
            output = self.output.outputs[delta.index]
            if output.finish_reason is not None:
                continue  # it was on its way when a stop string ended the completion
            piece = pieces.get(delta.index)
            if piece is None:
                pieces[delta.index] = piece = Piece(output, len(output.token_ids), "")
            text, stop = self._text.take(delta)
            piece.text += text
            if stop is not None:
                stopped.append(delta.index)
        return Taken(list(pieces.values()), stopped)

    def settle(self, taken: Taken) -> None:
        """The second half, in the event loop: the engine hears of stop strings."""
        self._ticket.started()
        for index in taken.stopped:
            self.stream.stop_at_text(index)
        if all(output.finish_reason is not None for output in self.output.outputs):
            self._ticket.ended()  # though the client may be slow to read

    def end(self) -> None:
        """Leave nothing of it behind in the engine."""
        self.stream.cancel()
        self._ticket.ended()


async def merged(
    generations: list[Generation],
) -> AsyncIterator[tuple[Generation, list[Delta]]]:
    """What is ready of several generations, as it comes."""
    if len(generations) == 1:
        async for deltas in generations[0].stream:
            yield generations[0], deltas
        return
    ready: asyncio.Queue[tuple[Generation, list[Delta] | BaseException | None]] = asyncio.Queue()

    async def read(generation: Generation) -> None:
        try:
            async for deltas in generation.stream:
                ready.put_nowait((generation, deltas))
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
