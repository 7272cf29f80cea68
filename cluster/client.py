"""What a client sees of an engine, wherever it runs: requests in, streams of token deltas out.

``EngineClient`` is the seam between the engine and its users (router, handles). Text is made at
the client's side (``engine.output.RequestText``); the engine speaks tokens.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from engine.config import ChatOptions
from engine.engine import Delta
from engine.outputs import RequestMetrics
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.stats import Metric


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
    chat_options: ChatOptions = ChatOptions()
    batch_invariant: bool = True  # a row's bits do not depend on the others of its batch
    start_seconds: float = 0.0  # from the start of its process's work until it served


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do now; a client has a figure at most half a second old."""

    running: int
    waiting: int  # sequences in the queue
    waiting_tokens: int
    free_blocks: int  # of the device
    draining: bool = False


class RequestStream(Protocol):
    """One request's deltas. ``metrics`` fills as they come; the last ones complete it."""

    request_id: str
    metrics: RequestMetrics

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Lists of all that is ready, until every completion has a finish reason.

        Raises EngineError, naming the cause, if the engine dies.
        """
        ...

    def stop_at_text(self, index: int) -> None:
        """End one completion whose text reached a stop string; its stream gives no more."""
        ...

    def cancel(self) -> None:
        """End the request now and free all that it holds; harmless when it has ended."""
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

    async def submit(self, request: Request) -> RequestStream:
        """Queue a request.

        Raises RequestError (PromptTooLong, QueueFull) as ``Engine.add`` does, and EngineError if
        the engine is gone or draining.
        """
        ...

    async def stats(self) -> list[Metric]:
        """What the engine has counted, as of now. Raises EngineError if it is gone."""
        ...

    async def close(self) -> None: ...
