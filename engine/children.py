"""What child processes that run a module of manta are started with."""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def child_environment(**variables: str) -> dict[str, str]:
    """This process's variables and ``variables``, with a path by which a child finds manta from
    any folder."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path} | variables
