"""What Ray and the other processes of a server log, in this one.

Ray would put the process before each line of another, and leave out what yet another has said much
the same, as two requests' access lines are.
"""

import json
import logging
import sys
from typing import Any

from engine.log import JsonLines

_RAYS_OWN = "ray_print_logs"
_INNER = ":job_id:", ":actor_name:", ":task_name:"  # lines that are for Ray


def as_json_only() -> None:
    """Have what Ray and other libraries log in this process be JSON too. To be called before Ray is
    initialised."""
    import ray.serve  # noqa: F401  # its loggers are set up once, when they are imported

    for name in ("ray", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)


def forward(as_json: bool) -> None:
    """Write them to standard error from now on: lines as they are, and of what is no JSON, if that
    is wanted, an object of its own. Ray must have been initialised."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    dispatcher.remove_handler(_RAYS_OWN)
    dispatcher.add_handler("manta", lambda data: _write(data, as_json))


def _write(data: dict[str, Any], as_json: bool) -> None:
    if data.get("pid") == "autoscaler":
        return  # pages of what `ray status` says
    lines = [line for line in data["lines"] if not line.startswith(_INNER)]
    if as_json:
        lines = [line if _is_object(line) else _wrapped(line, data) for line in lines]
    if lines:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _wrapped(line: str, data: dict[str, Any]) -> str:
    name = str(data.get("actor_name") or data.get("task_name") or "ray")
    record = logging.LogRecord(name, logging.INFO, "", 0, "%s", (line,), None)
    record.process = data.get("pid")
    return JsonLines().format(record)
