"""Fixtures shared by the tests."""

import workers  # noqa: F401, I001  # before torch: it bounds how long OpenMP's threads spin

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its interpreter runs the kernels
    os.environ["TRITON_INTERPRET"] = "1"

from tests.parity.tiny_models import TINY_MODELS
from tests.support.waiting import PATIENCE

# In this process: tiny models are no quicker with more, and wait for each of them while others want
# the cores. Servers and workers have processes, and threads, of their own.
torch.set_num_threads(1)
# What httpx waits for unless it is told otherwise: five seconds are a test of the machine.
httpx._config.DEFAULT_TIMEOUT_CONFIG.__init__(PATIENCE)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(name)`` is the folder of the tiny model ``name``, made at the first call."""
    folder = tmp_path_factory.mktemp("tiny")
    models = {model.name: model for model in TINY_MODELS}
    made: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        if name not in made:
            made[name] = models[name].save(folder, **options)
        return made[name]

    return get
