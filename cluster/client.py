"""What a client sees of an engine, wherever it runs: continuations in, outcomes out.

``EngineClient`` is the seam between an engine and its users (router, handles). Text is made at the
client's side (``engine.collector``); the engine speaks tokens. A request's way over engines, one
after the other, is ``cluster.streams.Stream``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.config import ChatOptions, FailoverConfig, ServedAs
from engine.continuation import Continuation
from engine.outcome import Outcome
from engine.pooling import Pooling
from engine.sampling_params import SamplingParams
from engine.stats import Metric

if TYPE_CHECKING:
    from cluster.attempts import Attempt
    from cluster.messages import Times


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine serves; it never changes while the engine lives.

    ``tokenizer`` is what ``Tokenizer.load`` takes; ``default_sampling`` is what the checkpoint
    recommends, ``recommended_max_tokens`` how long it says that an answer may be, None if it does
    not say. ``step_timeout``: a step that takes more seconds hangs.
    """

    engine_id: str
    model: str
    tokenizer: str
    revision: str | None
    chat_template: str | None
    max_model_len: int
    vocab_size: int
    max_logprobs: int
    block_size: int
    num_device_blocks: int
    num_cpu_blocks: int
    scheduling_policy: str
    default_sampling: SamplingParams
    recommended_max_tokens: int | None = None
    step_timeout: float = 60.0
    failover: FailoverConfig = FailoverConfig()
    chat_options: ChatOptions = ChatOptions()
    served: ServedAs = ServedAs()
    batch_invariant: bool = True  # a row's bits do not depend on the others of its batch
    generates: bool = True  # see ``ModelFacts``
    pooling: Pooling | None = None
    vector_size: int = 0
    start_seconds: float = 0.0  # from the start of its process's work until it served

    @property
    def names(self) -> tuple[str, ...]:
        """Those of its model, for clients. The first tells it from a server's other models."""
        return self.served.names or (self.model,)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do now; a client has a figure at most half a second old."""

    running: int
    waiting: int  # sequences in the queue
    waiting_tokens: int
    free_blocks: int  # of the device
    draining: bool = False  # it will take no further request
    recovering: bool = False  # its workers are started again
    closing: bool = False  # it drains because its whole server shuts down

    @property
    def admits(self) -> bool:
        """Whether a request had better be there than elsewhere."""
        return not (self.draining or self.recovering)


class Sink(Protocol):
    """Where the outcomes of an attempt go; all in the client's asyncio loop."""

    def put_token(self, attempt: "Attempt", index: int, position: int, token: int) -> None:
        """A plain token."""
        ...

    def put_times(self, attempt: "Attempt", times: "Times") -> None:
        """What the engine measured of it so far."""
        ...

    def put(self, attempt: "Attempt", outcome: Outcome) -> None:
        """Anything else."""
        ...

    def lost(self, attempt: "Attempt", cause: str) -> None:
        """The engine is gone; nothing more comes of this attempt."""
        ...

    def ended(self, attempt: "Attempt", cause: str) -> None:
        """The engine has ended the request, for a cause that is not to be tried elsewhere."""
        ...

    def asked_to_leave(self, attempt: "Attempt") -> None:
        """The engine would rather have the request go elsewhere."""
        ...


class EngineClient(Protocol):
    """A connection to one engine, shared by all requests of this process."""

    info: EngineInfo

    @property
    def load(self) -> EngineLoad: ...

    @property
    def healthy(self) -> bool:
        """Whether the engine answers and its scheduler makes progress."""
        ...

    async def submit(self, request: Continuation, sink: Sink) -> "Attempt":
        """Queue a request, whose outcomes go to ``sink``.

        Raises RequestError (PromptTooLong, QueueFull) as ``Engine.add`` does, and EngineError if
        the engine is gone or draining.
        """
        ...

    async def stats(self) -> list[Metric]:
        """What the engine has counted, as of now. Raises EngineError if it is gone."""
        ...

    async def close(self) -> None: ...
