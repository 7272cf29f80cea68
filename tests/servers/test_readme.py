"""Every example of the README runs."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cli import main
from tests.support.served import ROOT, Served, serve
from tests.support.waiting import PATIENCE
from workers.checkpoint import EMBEDDED_PATH

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
HERE = "http://localhost:8000"


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


PYTHON = blocks("python")
SERVED = [text for text in PYTHON if HERE in text]
OFFLINE = [text for text in PYTHON if "LLM()" in text]
STRUCTURED = [text for text in OFFLINE if "StructuredOutputsParams" in text]
SHARED = [text for text in PYTHON if "start_engine" in text]
PARALLEL = [text for text in PYTHON if "tensor_parallel_size" in text]
COMMANDS = [
    line.split("  #")[0].strip()
    for text in blocks("")
    for line in text.splitlines()
    if line.startswith("manta ")
]
CLIENTS = ("manta chat", "manta complete", "manta bench serve")
START_SERVER = [command for command in COMMANDS if command.startswith("manta serve")]
ASK_SERVER = [command for command in COMMANDS if command.startswith(CLIENTS)]
ALONE = [command for command in COMMANDS if command not in START_SERVER + ASK_SERVER]


def test_there_are_examples() -> None:
    assert sorted(SERVED + OFFLINE + SHARED + PARALLEL) == sorted(PYTHON)
    assert SERVED and OFFLINE and SHARED and STRUCTURED
    assert len(ALONE) >= 4 and len(START_SERVER) >= 2 and len(ASK_SERVER) >= 4
    assert blocks("bash") and blocks("javascript")


# ---- without a server ----


@pytest.mark.parametrize("text", OFFLINE)
def test_offline(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(text, "README.md", "exec"), {})
    out = capsys.readouterr().out
    if text in STRUCTURED:
        assert len(ast.literal_eval(out)) == 2
        return
    assert "The capital of France is ->  Paris" in out
    assert out.rstrip().endswith((".", "!", "?"))  # the whole joke


@pytest.mark.parametrize("command", ALONE)
def test_command(
    command: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = shlex.split(command.replace("path/or/hub-id", str(EMBEDDED_PATH)))
    if words[1] == "replay":
        monkeypatch.chdir(tmp_path)
        log = ["--schedule-log", words[2], "--max-tokens", "4"]
        assert main(["generate", "Hello", *log]) == 0
    assert main(words[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", START_SERVER)
def test_the_options_of_a_server(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command.replace("path/or/hub-id", str(EMBEDDED_PATH)))
    words = [word for word in words if word not in ("--api-key", "sesame")]  # a secret: not shown
    assert main([*words[1:], "--print-serve-config"]) == 0
    assert "import_path: deploy.serve:build" in capsys.readouterr().out


@pytest.mark.parametrize("text", SHARED)
def test_a_shared_engine(text: str) -> None:
    assert "Paris" in run([sys.executable, "-c", text])


@pytest.mark.parametrize("text", PARALLEL)
def test_a_split_model(text: str) -> None:
    few = text.replace("path/or/hub-id", str(EMBEDDED_PATH)).replace(")", ", worker_cpus=0.25)")
    assert few != text
    program = f"from manta import LLM\n{few}\nprint(llm.generate('The capital of France is'))"
    assert "Paris" in run([sys.executable, "-c", program])


def run(command: list[str], typed: str = "") -> str:
    done = subprocess.run(
        command, cwd=ROOT, input=typed, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- with one ----


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serve() as served:
        yield served


@pytest.mark.parametrize("text", SERVED)
def test_python_client(text: str, server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(text.replace(HERE, server.url), "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize("text", blocks("bash"))
def test_curl(text: str, server: Served) -> None:
    out = run(["bash", "-c", text.replace(HERE, server.url)])
    assert '"object":"chat.completion"' in out and "serving system" in out


@pytest.mark.parametrize("text", blocks("javascript"))
def test_node_client(text: str, server: Served) -> None:
    assert (ROOT / "tests/node/node_modules/openai").is_dir(), "run: npm ci --prefix tests/node"
    file = ROOT / "tests/node/readme.mjs"  # beside node_modules, where Node looks for the client
    try:
        file.write_text(text.replace(HERE, server.url), encoding="utf-8")
        assert "Paris" in run(["node", str(file)])
    finally:
        file.unlink()


@pytest.mark.parametrize("command", ASK_SERVER)
def test_command_line_client(command: str, server: Served) -> None:
    words = shlex.split(command)
    where = ["--base-url", server.url] if "bench" in words else ["--url", f"{server.url}/v1"]
    out = run([sys.executable, "-m", "deploy.cli", *words[1:], *where], "Hello\n")
    assert out.strip()
