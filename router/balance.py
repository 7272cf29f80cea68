"""Which engine a request goes to: the one that has its prompt's beginning in its prefix cache,
unless what waits there costs more than computing it elsewhere.

Costs are in tokens of prefill. An engine costs a request the tokens of its prompt that it would
have to compute, and what is queued and runs there already. What an engine has cached is guessed
from what was sent to it, by chained hashes of the prompt's blocks, as the engine itself keys its
blocks. A beginning that was never seen prefers one engine by rendezvous hashing (Thaler and
Ravishankar, 1998), so that several ingress processes agree without a word, and so that few move
when an engine comes or goes.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from cluster.client import EngineClient

SEQUENCE_COST = 64  # a sequence under way slows the others as this many tokens of prefill
PREFERENCE = 4 * SEQUENCE_COST  # how much more may wait at the engine that hashing prefers
SHORTAGE = 4  # tokens for which there are no free blocks cost this many times: others are preempted
FINE_BLOCKS, COARSE_BLOCKS = 64, 16  # blocks are hashed one by one at first, then by so many
KEY_TOKENS = 64  # the beginning that rendezvous hashing goes by
REMEMBERED = 1 << 16  # hashes


@dataclass(slots=True)
class _Backlog:
    """What this process has under way at one engine."""

    sequences: int = 0
    queued_tokens: int = 0  # of prompts without a first token


@dataclass(slots=True)
class Ticket:
    """A request's place with an engine: tell when it got its first token, and when it ended."""

    client: EngineClient
    _engine: _Backlog
    _sequences: int
    _queued: int
    _ended: bool = field(default=False)

    def started(self) -> None:
        """The first token is there; harmless to say again."""
        self._engine.queued_tokens -= self._queued
        self._queued = 0

    def ended(self) -> None:
        """Nothing of the request is left; harmless to say again."""
        if not self._ended:
            self._ended = True
            self.started()
            self._engine.sequences -= self._sequences


class Balancer:
    """Chooses among engines and remembers what it sent where."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()  # by hash, engine ids
        self._engines: dict[str, _Backlog] = {}

    def choose(
        self,
        prompt: Sequence[int],
        sequences: int,
        engines: Sequence[EngineClient],
        known: int = 0,
    ) -> Ticket:
        """The engine, of at least one, for ``sequences`` completions of a prompt. ``known``: tokens
        of these that are there already, and are to be computed again."""
        hashes = list(_chain(prompt, engines[0].info.block_size))
        ids = [engine.info.engine_id for engine in engines]
        cached = self._cached(hashes, ids)
        scores = _rendezvous(prompt, ids)
        preferred = None if any(cached.values()) else max(ids, key=scores.__getitem__)

        def cost(engine: EngineClient) -> tuple[float, bytes]:
            id = engine.info.engine_id
            tokens = len(prompt) - cached[id]
            tokens += self._backlog(engine, len(prompt) + known, sequences)
            return tokens - PREFERENCE * (id == preferred), scores[id]

        chosen = min(engines, key=cost)
        id = chosen.info.engine_id
        self._remember(hashes, id)
        own = self._engines.setdefault(id, _Backlog())
        queued = len(prompt) - cached[id] + known
        own.sequences += sequences
        own.queued_tokens += queued
        return Ticket(chosen, own, sequences, queued)

    def _backlog(self, engine: EngineClient, prompt: int, sequences: int) -> int:
        """What is before a request at an engine. The engine's own figures are of all ingress
        processes, but a step old; this process's are of now."""
        load, own = engine.load, self._engines.get(engine.info.engine_id, _Backlog())
        active = max(load.running + load.waiting, own.sequences)
        waiting = max(load.waiting_tokens, own.queued_tokens)
        short = prompt + waiting - load.free_blocks * engine.info.block_size
        return waiting + SEQUENCE_COST * active + SHORTAGE * max(0, short)

    def _cached(self, hashes: list[tuple[bytes, int]], ids: list[str]) -> dict[str, int]:
        """How many tokens of a prompt each engine has seen."""
        cached = dict.fromkeys(ids, 0)
        holders = set(ids)
        for digest, tokens in hashes:
            holders = holders & self._holders.get(digest, set())
            if not holders:
                break
            for id in holders:
                cached[id] = tokens
        return cached

    def _remember(self, hashes: list[tuple[bytes, int]], id: str) -> None:
        for digest, _ in reversed(hashes):  # a prompt's beginning is forgotten after its end
            self._holders.setdefault(digest, set()).add(id)
            self._holders.move_to_end(digest)
        while len(self._holders) > self._remembered:
            self._holders.popitem(last=False)


def _chain(prompt: Sequence[int], block_size: int) -> Iterator[tuple[bytes, int]]:
    """(hash of the prompt's first tokens, how many) at ends of blocks."""
    tokens = array("q", prompt).tobytes()
    end, digest = 0, b""
    while True:
        start = end
        fine = start < FINE_BLOCKS * block_size
        end += block_size if fine else COARSE_BLOCKS * block_size
        if end > len(prompt):
            return
        digest = blake2b(tokens[8 * start : 8 * end], digest_size=16, key=digest).digest()
        yield digest, end


def _rendezvous(prompt: Sequence[int], ids: list[str]) -> dict[str, bytes]:
    """A score for each engine, by the prompt's beginning; the greatest wins."""
    key = array("q", prompt[:KEY_TOKENS]).tobytes()
    beginning = blake2b(key, digest_size=16).digest()
    return {id: blake2b(id.encode(), digest_size=8, key=beginning).digest() for id in ids}
