"""Every example of the README runs."""

import re
import shlex
from pathlib import Path

import pytest

from deploy.cli import main
from workers.checkpoint import EMBEDDED_PATH

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line.split("  #")[0].strip()
    for language, text in BLOCKS
    if not language
    for line in text.splitlines()
    if line.startswith("manta ")
]


def test_there_are_examples() -> None:
    assert PYTHON and len(COMMANDS) >= 4


@pytest.mark.parametrize("text", PYTHON)
def test_python(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(text, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "The capital of France is ->  Paris" in out
    assert out.rstrip().endswith((".", "!", "?"))  # the whole joke


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command.replace("path/or/hub-id", str(EMBEDDED_PATH)))
    assert main(words[1:]) == 0
    assert capsys.readouterr().out.strip()
