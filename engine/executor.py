"""What carries plans out. Everything above this interface is decided without torch."""

from dataclasses import dataclass
from typing import Protocol

from engine.plan import StepPlan, StepResult
from engine.pooling import Pooling
from engine.preempt import MeasuredCosts


@dataclass(frozen=True)
class ModelFacts:
    """What the checkpoint says and loading measured."""

    architecture: str
    vocab_size: int
    max_model_len: int  # the model's own limit, or less if the config asks for less
    num_parameters: int
    weight_bytes: int
    load_seconds: float
    dtype: str
    device: str
    batch_invariant: bool = True  # a row's bits do not depend on the others of its batch
    generates: bool = True  # tokens; without an output layer there are none
    pooling: Pooling | None = None  # None: it makes no vectors
    vector_size: int = 0
    causal: bool = True  # else a prompt is computed in one piece, and none of it is found cached
    quantization: str = ""  # how linear layers' weights are stored, and what they are kept as


@dataclass(frozen=True)
class Capacity:
    """What was reserved, and what copying and computing cost."""

    num_device_blocks: int
    num_cpu_blocks: int
    block_size: int
    block_bytes: int  # of all layers
    attention_backend: str
    costs: MeasuredCosts
    kv_cache_dtype: str = ""  # what blocks hold: fp8, or the model's type
    num_states: int = 0  # of sequences on the device, where layers keep any
    num_cpu_states: int = 0
    state_bytes: int = 0  # of all layers


class PendingResult(Protocol):
    """A step that was started."""

    def result(self) -> StepResult:
        """Wait for the step; raises EngineError if it failed."""
        ...


class Executor(Protocol):
    """Five verbs, and questions. Plans run in the order in which they are given.

    ``steps_ahead``: how many steps it pays to plan before a result. ``pipelined``: steps in flight
    must have no sequence in common, as the stages of a pipeline need; else it feeds a sequence its
    last sampled token itself.
    """

    @property
    def steps_ahead(self) -> int: ...

    @property
    def pipelined(self) -> bool: ...

    def load(self) -> ModelFacts: ...

    def reserve(self) -> Capacity:
        """Allocate the slots and the KV blocks of both tiers."""
        ...

    def run(self, plan: StepPlan) -> PendingResult: ...

    def check(self) -> None:
        """Raise EngineError, naming the cause, if it can run nothing more; takes no time."""
        ...

    def restart(self) -> None:
        """After a failure: start again with as many blocks, which hold nothing, and no plans.

        Raises EngineError if it cannot.
        """
        ...

    def stop(self) -> None: ...
