"""Quantized weights from end to end: docs/quantization.md is true."""

import logging
import re
from pathlib import Path

import pytest

DOCS = (Path(__file__).resolve().parents[2] / "docs/quantization.md").read_text(encoding="utf-8")


def test_the_example_runs_and_the_log_says_what_is_computed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    small = 'quantization="fp8", kv_cache_memory_bytes=1 << 26, swap_space=0.01'
    with caplog.at_level(logging.INFO, logger="manta"):
        exec(compile(code.replace('quantization="fp8"', small), "quantization.md", "exec"), {})
    assert "Manta is a" in capsys.readouterr().out
    (line,) = [message for message in caplog.messages if message.startswith("Loaded")]
    weights = "fp8 made of other weights, a scale for each output"
    assert f"; {weights}, activations in fp8, a scale for each token, kept as bfloat16)" in line
