"""Fixtures of the unit tests."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """``copy(name)`` is a checkpoint that the test may break."""
    return lambda name: Path(shutil.copytree(checkpoint(name), tmp_path / name))
