"""Checkpoint folders that tests change."""

import json
from pathlib import Path
from typing import Any


def configure(path: Path, **fields: Any) -> None:
    """Set fields of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
