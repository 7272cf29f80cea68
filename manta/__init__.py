"""manta: a distributed multi-GPU serving system for large language models on Ray.

The public names, imported when they are first used:

    from manta import LLM, SamplingParams, RequestOutput
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.handle import AsyncEngineHandle as AsyncEngineHandle
    from cluster.handle import EngineHandle as EngineHandle
    from cluster.handle import connect as connect
    from cluster.handle import connect_async as connect_async
    from cluster.handle import start_engine as start_engine
    from cluster.handle import stop_engine as stop_engine
    from cluster.llm import LLM as LLM
    from deploy.engine_set import scale as scale
    from deploy.models import add_model as add_model
    from deploy.models import remove_model as remove_model
    from engine.errors import CheckpointError as CheckpointError
    from engine.errors import ConfigError as ConfigError
    from engine.errors import EngineError as EngineError
    from engine.errors import MantaError as MantaError
    from engine.errors import PromptTooLong as PromptTooLong
    from engine.errors import QueueFull as QueueFull
    from engine.errors import RequestError as RequestError
    from engine.errors import Unavailable as Unavailable
    from engine.outputs import CompletionOutput as CompletionOutput
    from engine.outputs import Logprob as Logprob
    from engine.outputs import Piece as Piece
    from engine.outputs import RequestOutput as RequestOutput
    from engine.pooling import PoolingParams as PoolingParams
    from engine.pooling import PoolingRequestOutput as PoolingRequestOutput
    from engine.sampling_params import SamplingParams as SamplingParams
    from engine.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "cluster.llm",
    "start_engine": "cluster.handle",
    "connect": "cluster.handle",
    "connect_async": "cluster.handle",
    "stop_engine": "cluster.handle",
    "scale": "deploy.engine_set",
    "add_model": "deploy.models",
    "remove_model": "deploy.models",
    "EngineHandle": "cluster.handle",
    "AsyncEngineHandle": "cluster.handle",
    "Piece": "engine.outputs",
    "SamplingParams": "engine.sampling_params",
    "StructuredOutputsParams": "engine.structured_outputs",
    "RequestOutput": "engine.outputs",
    "CompletionOutput": "engine.outputs",
    "Logprob": "engine.outputs",
    "PoolingParams": "engine.pooling",
    "PoolingRequestOutput": "engine.pooling",
    "MantaError": "engine.errors",
    "ConfigError": "engine.errors",
    "CheckpointError": "engine.errors",
    "RequestError": "engine.errors",
    "Unavailable": "engine.errors",
    "PromptTooLong": "engine.errors",
    "QueueFull": "engine.errors",
    "EngineError": "engine.errors",
}
__all__ = ["__version__", *_HOMES]


def _check_siblings() -> None:
    """Other distributions have packages of our names; say so rather than fail somewhere inside."""
    home = Path(__file__).resolve().parent.parent
    for name in ("engine", "workers", "cluster", "deploy"):
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec else []
        if home / name not in [Path(place).resolve() for place in places]:
            found = f"found {places[0]}" if places else "found none"
            raise ImportError(
                f"manta needs its own package {name!r} from {home}, but {found}; another"
                f" distribution, or a folder on sys.path, has taken the name"
            )


_check_siblings()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'manta' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
