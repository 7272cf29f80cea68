"""What the log says of waits, and how its lines are written."""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine import log
from tests.support.waiting import until


def test_a_wait_says_what_is_waited_for_as_long_as_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "WAITING", 0.01)
    logger = logging.getLogger("somewhere")
    with caplog.at_level(logging.INFO), log.waiting_for(logger, "Godot"):
        until(lambda: len(caplog.records) > 1)
    said = {record.getMessage() for record in caplog.records}
    assert "Waiting for Godot: 0 s so far" in said
    count = len(caplog.records)
    with caplog.at_level(logging.INFO), log.waiting_for(logger, "somebody else"):
        until(lambda: len(caplog.records) > count + 2)
    assert not any("Godot" in record.getMessage() for record in caplog.records[count + 1 :])


def test_lines_are_json_for_this_process_and_those_that_it_starts() -> None:
    program = """if True:
        import os, subprocess, sys
        from engine.log import get_logger, set_format
        logger = get_logger("x")
        logger.info("for people: %s", 'a "b"', extra={"fields": {"n": 1, "of": "x"}})
        if "MANTA_LOG_FORMAT" not in os.environ:
            set_format("json")
            logger.warning('said "é" %d', 5, extra={"fields": {"tokens": 7}})
            try:
                1 / 0
            except ZeroDivisionError:
                logger.exception("failed")
            subprocess.run([sys.executable, *sys.argv])
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program)
        env = {k: v for k, v in os.environ.items() if k != log.FORMAT_VARIABLE}
        root = Path(log.__file__).parents[1]
        done = subprocess.run(
            [sys.executable, str(file), str(file)], capture_output=True, text=True, check=True,
            env=env | {"PYTHONPATH": str(root)},
        )  # fmt: skip
    first, *lines = done.stderr.splitlines()
    assert first.startswith("INFO ") and first.endswith(' [manta.x] for people: a "b" n=1 of=x')
    warning, error, inner = map(json.loads, lines)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", warning.pop("time"))
    assert warning.pop("pid") == error["pid"] != inner["pid"]
    expected = {"level": "warning", "logger": "manta.x", "message": 'said "é" 5', "tokens": 7}
    assert warning == expected
    assert error["error"].endswith("ZeroDivisionError: division by zero")
    assert inner["message"] == 'for people: a "b"'
