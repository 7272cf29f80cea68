"""What the log says of waits."""

import logging

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
