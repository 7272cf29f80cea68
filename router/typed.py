"""Answers of typed parts: a stream's events build what the whole answer is."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.outputs import Piece
from engine.parsing.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallStart
from router.answers import Answer, check, to_json
from router.chat import ChatRun
from router.generation import Generation, merged
from router.schema import ChatRequest
from router.service import Service


@dataclass(slots=True)
class Block:
    """A part of an answer that is being written: text for the user, thinking, or a call's
    arguments. ``id`` and ``name`` are a call's."""

    kind: type[Content] | type[Reasoning] | type[ToolCallStart]
    text: str = ""
    id: str = ""
    name: str = ""


class TypedAnswer(Answer):
    """The answer of a chat as blocks, one after the other. A subclass gives its API's shapes.

    Whole or as a stream, the same events happen; a whole answer is what they have built.
    """

    def __init__(self, service: Service, chat: ChatRequest, run: ChatRun) -> None:
        super().__init__(service, run.model, chat, [run.prompt], run.sampling)
        self._parsing = run.parsing
        self._parser = run.parsing.parser() if run.parsing else None
        self._block: Block | None = None
        self._thought = ""  # all that the model thought
        self._thinking_tokens = 0
        self._called = False
        self._finish: tuple[str | None, int | str | None] = None, None  # reason, and what caused it
        self._events: list[bytes] = []

    # ---- the shapes ----

    @abstractmethod
    def _start(self, block: Block) -> None:
        """A block begins."""

    @abstractmethod
    def _more(self, block: Block, text: str) -> None:
        """A block has more text; it is in ``block.text`` already."""

    @abstractmethod
    def _stop(self, block: Block, cut: bool) -> None:
        """A block ends; ``cut``: in the middle, with the answer."""

    @abstractmethod
    def _finished(self, generation: Generation) -> None:
        """The answer ends; ``_finish`` says why."""

    @abstractmethod
    def _whole(self) -> Any:
        """The whole answer, of what has happened."""

    def _event(self, type: str, fields: dict[str, Any]) -> None:
        """An event of a stream."""
        if self.streaming:
            data = to_json({"type": type, **fields})
            self._events.append(b"event: %b\ndata: %b\n\n" % (type.encode(), data))

    # ---- the run ----

    async def complete(self, generations: list[Generation]) -> bytes:
        async for generation, outcomes in merged(generations):
            self._chunks(generation, await self._take(generation, outcomes))
        await self._end(generations)
        return to_json(self._whole())

    def _chunks(self, generation: Generation, pieces: list[Piece]) -> bytes:
        for piece in pieces:
            check(generation.output.outputs[piece.index])
            if piece.finish_reason is not None:
                self._finish = piece.finish_reason, piece.stop_reason
            for part in self._parts(generation, piece):
                self._add(part)
        return self._taken()

    async def _end(self, generations: list[Generation]) -> bytes:
        (generation,) = generations
        reason, _ = self._finish
        self._next(None, cut=reason != "stop")
        if self._thought:
            counted = await self.service.encode(
                self.model, [self._thought], False, self.model.info.max_model_len, "messages"
            )
            produced = self.length(generation.output.outputs[0])
            self._thinking_tokens = min(len(counted[0]), produced)
        self._finished(generation)
        return self._taken()

    def _taken(self) -> bytes:
        data = b"".join(self._events)
        self._events.clear()
        return data

    def _parts(self, generation: Generation, piece: Piece) -> Iterable[Part]:
        """The parts that a piece makes certain."""
        if self._parser is None or self._parsing is None:
            return [Content(piece.text)] if piece.text else []
        parts = self._parser.push(piece.text)
        if piece.finish_reason is not None:
            parts += self._parser.finish(cut=piece.finish_reason != "stop")
        return self._parsing.shown(parts)

    def _add(self, part: Part) -> None:
        if isinstance(part, ToolCallStart):
            self._called = True
            self._next(Block(ToolCallStart, id=part.id, name=part.name))
            return
        kind = ToolCallStart if isinstance(part, ToolCallArguments) else type(part)
        if self._block is None or self._block.kind is not kind:
            self._next(Block(kind))
        assert self._block is not None
        self._block.text += part.text
        if kind is Reasoning:
            self._thought += part.text
        self._more(self._block, part.text)

    def _next(self, block: Block | None, cut: bool = False) -> None:
        if self._block is not None:
            self._stop(self._block, cut)
        self._block = block
        if block is not None:
            self._start(block)
