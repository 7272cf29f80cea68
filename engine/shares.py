"""Fair shares between clients: whose turn it is, whatever each of them has in the queue."""


class FairShares:
    """Start-time fair queueing (Goyal, Vin and Cheng, 1996) by the tokens that sequences cost.

    Every client has its own line, in which a sequence begins where the one before it ends, at the
    earliest now; the queue is in the order of these beginnings. A client that asks for much waits
    behind itself, and one that comes anew is next. What a sequence cost less than it might have is
    given back when it ends, so a client is charged for what it got.
    """

    def __init__(self) -> None:
        self._now = 0.0  # the latest beginning that was served
        self._ends: dict[str, float] = {}  # of each client's line, where that is not past

    def arrive(self, client: str, cost: int, moved: bool = False) -> float:
        """The place in the queue of a sequence that may cost so many tokens. One that ``moved`` had
        its turn at another engine: it is next, or moves could keep it waiting for ever."""
        start = max(self._now, self._ends.get(client, 0.0))
        self._ends[client] = start + cost
        return self._now if moved else start

    def serve(self, start: float) -> None:
        """A sequence with this place begins to run."""
        if start > self._now:
            self._now = start
            past = [client for client, end in self._ends.items() if end <= start]
            for client in past:
                del self._ends[client]

    def give_back(self, client: str, tokens: int) -> None:
        """A sequence of the client's ended that cost so much less than it might have."""
        if client in self._ends:
            self._ends[client] -= tokens
