"""What the executor and its workers say to each other, beside plans and results."""

from dataclasses import dataclass

from engine.config import EngineConfig
from engine.executor import Capacity, ModelFacts
from engine.plan import Ints, StepPlan


@dataclass(frozen=True)
class Hello:
    """A worker's first words on a connection: its control, then, without rings, its steps.

    ``ring`` is the path of its ring of results, empty if it could not open the executor's.
    """

    token: str  # shows that the executor started it
    rank: int
    pid: int
    host: str  # the address at which others reach it
    ring: str


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs to know to take its place."""

    config: EngineConfig
    path: str  # the checkpoint's folder on the executor's machine
    is_folder: bool  # the model is that folder, not a hub id that another machine may fetch too
    device: str  # cpu or cuda
    hosts: tuple[str, ...]
    nccl: bool
    store: tuple[str, int]
    neighbours: int  # ranks on its machine, itself included
    gpu_share: int  # ranks on its GPU, itself included


@dataclass(frozen=True)
class Units:
    """Numbers of KV blocks and of sequences' states, in each tier."""

    blocks: int
    cpu_blocks: int
    states: int = 0
    cpu_states: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a worker gave up. ``kind`` is the error's class; ``trace`` its traceback."""

    kind: str
    message: str
    trace: str


@dataclass(frozen=True)
class Order:
    """From the executor, one of these at a time."""

    setup: Setup | None = None
    measure: bool = False
    reserve: Units | None = None
    ping: bool = False


@dataclass(frozen=True)
class Report:
    """From a worker, one of these at a time."""

    hello: Hello | None = None
    read: int = 0  # bytes of weights, since the last report
    facts: ModelFacts | None = None
    units: Units | None = None
    capacity: Capacity | None = None
    failure: Failure | None = None
    pong: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A plan, and the tokens [n, 3] (slot, position, token) sampled since the plan before it."""

    plan: StepPlan
    tokens: Ints
