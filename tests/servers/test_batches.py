"""``manta run-batch`` as users run it, on the embedded model."""

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from cluster.data import _Stage
from deploy.cli import _parse, main
from manta import LLM, SamplingParams
from tests.support.served import ROOT
from tests.support.waiting import PATIENCE, until
from workers.checkpoint import EMBEDDED_PATH

SMALL = ["--kv-cache-memory-bytes", "64M", "--swap-space", "0.05", "--no-use-tqdm-on-load"]
GREEDY = {"temperature": 0, "max_tokens": 8}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def asked(custom_id: str, url: str = COMPLETION, **body: Any) -> dict[str, Any]:
    body = {"model": "manta-demo", "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(file: Path, *lines: dict[str, Any] | str) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def command(tmp_path: Path, *options: str) -> list[str]:
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    return ["run-batch", *files, *options, *SMALL]


def test_each_line_is_answered_or_has_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    write(
        tmp_path / "in.jsonl",
        asked("chat", CHAT, messages=question),
        "{no json",
        asked("text", prompt="The capital of France is", max_tokens=4),
        asked("field", prompt="a", max_tokens=-1),
        asked("template", CHAT, messages=[{"role": "stranger"}]),
        asked("stream", prompt="a", stream=True),
        asked("route", "/v1/models"),
        asked("name", prompt="a", model="other"),
        {**asked("method", prompt="a"), "method": "GET"},
        {**asked("body"), "body": [1]},
        asked("chat", prompt="a"),
    )
    assert main(command(tmp_path)) == 0
    out = read(tmp_path / "out.jsonl")
    assert len(out) == 11 and all(line["id"].startswith("batch_req_") for line in out)
    assert "100%" in capsys.readouterr().err
    answers = {line["custom_id"]: line["response"] for line in out if line["response"]}
    chat = ChatCompletion.model_validate(answers["chat"]["body"], strict=True)
    assert "Paris" in (chat.choices[0].message.content or "")
    text = Completion.model_validate(answers["text"]["body"], strict=True)
    assert [choice.text for choice in text.choices] == [" Paris. It lies"]
    assert answers["text"]["request_id"] == text.id
    told = {
        name: (answer["status_code"], answer["body"]["error"]["param"])
        for name, answer in answers.items()
        if answer["status_code"] != 200
    }
    assert told == {
        "field": (400, "max_tokens"),
        "template": (400, "messages"),
        "name": (404, "model"),
        "body": (400, None),
    }
    errors = [(line["custom_id"], line["error"]["code"]) for line in out if line["error"]]
    assert set(errors) == {
        ("chat", "duplicate_custom_id"),
        (None, "invalid_line"),
        ("method", "invalid_method"),
        ("route", "invalid_url"),
        ("stream", "unsupported_value"),
    }


def test_what_was_interrupted_goes_on_where_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed, then stopped by Ctrl-C, then run to its end."""
    lines = [
        asked(f"r{i}", prompt=f"Number {i} is", max_tokens=100, ignore_eos=True) for i in range(40)
    ]
    write(tmp_path / "in.jsonl", *lines)
    target = tmp_path / "out.jsonl"
    words = command(tmp_path, "--max-concurrency", "8")
    slowly = command(tmp_path, "--max-concurrency", "1")  # so that it is not over when interrupted
    before = b""
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *slowly], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        enough = len(before) + 1000
        until(lambda size=enough: target.exists() and target.stat().st_size > size, PATIENCE)
        process.send_signal(number)
        assert process.wait(PATIENCE) == status
        found = target.read_bytes()
        assert found.startswith(before) and found.count(b"\n") < 40
        before = found
    with target.open("ab") as file:
        file.write(b'{"id":"batch_req_12')  # as if in the middle of a line
    with caplog.at_level("INFO"):
        assert main(words) == 0
    assert target.read_bytes().startswith(before)
    out = read(target)
    assert sorted(line["custom_id"] for line in out) == sorted(line["custom_id"] for line in lines)
    assert all(line["response"]["body"]["usage"]["completion_tokens"] == 100 for line in out)
    done = before.count(b"\n")
    assert f"40 lines: {40 - done} answered, 0 with an error, {done} were in" in caplog.text
    with caplog.at_level("INFO"):
        assert main(words) == 0
    assert caplog.messages[-1] == "The output has all 40 answers"  # no model was loaded for it
    write(tmp_path / "in.jsonl", *lines, asked("later", prompt="a", max_tokens=1))
    assert main(words) == 0
    assert [line["custom_id"] for line in read(target)[40:]] == ["later"]


def test_the_examples_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need a cluster are read only; test_handles.py and test_client_commands.py run
    such."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/batches.md").read_text(encoding="utf-8")
    (requests,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    Path("requests.jsonl").write_text(requests, encoding="utf-8")
    commands = re.findall(r"^manta (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.replace("path/or/hub-id", str(EMBEDDED_PATH)))
        assert vars(_parse(words))["input_file"] == "requests.jsonl"
        if not {"--num-replicas", "--join"} & {*words}:
            assert main([*words, *SMALL, "--served-model-name", "manta-demo"]) == 0
            answers = read(tmp_path / "answers.jsonl")
            assert [answer["response"]["status_code"] for answer in answers] == [200, 200]
            Path("answers.jsonl").unlink()


def test_rows_of_a_dataset_are_answered_or_have_their_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process of the stage, as Ray Data runs it: batches come side by side."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the stage sets it
    options = {"kv_cache_memory_bytes": 64 << 20, "swap_space": 0.05, "use_tqdm_on_load": False}

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        asks: dict[str, Any] = {"prompt": row["text"]}
        if row["n"] == 1:
            asks = {"messages": [{"role": "user", "content": row["text"]}]}
        elif row["n"] == 2:
            asks |= {"sampling_params": {"temperature": -1}}
        elif row["n"] == 3:
            asks = {}
        elif row["n"] == 4:
            asks |= {"sampling_params": {"temprature": 1}}
        return {"n": row["n"], "sampling_params": GREEDY, **asks}

    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in ("n", "generated_text", "error", "finish_reason")}

    async def ask(stage: _Stage, first: int) -> list[dict[str, Any]]:
        rows = [{"n": n, "text": f"Number {n} is"} for n in range(first, first + 20)]
        (answered,) = [table async for table in stage(pyarrow.Table.from_pylist(rows))]
        return list(answered.to_pylist())

    async def main() -> list[dict[str, Any]]:
        stage = _Stage({"model": "manta-demo", **options}, 1, preprocess, postprocess)
        batches = await asyncio.gather(*(ask(stage, first) for first in (0, 20, 40)))
        await (await stage._engine).close()
        return [row for batch in batches for row in batch]

    answered = asyncio.run(main())
    assert [row["n"] for row in answered] == list(range(60))
    llm = LLM(**options)
    params = SamplingParams(**GREEDY)
    texts = [
        one.outputs[0].text for one in llm.generate([f"Number {n} is" for n in range(60)], params)
    ]
    chat = [{"role": "user", "content": "Number 1 is"}]
    texts[1] = llm.chat(chat, params)[0].outputs[0].text
    for row, text in zip(answered, texts, strict=True):
        if row["n"] not in (2, 3, 4):
            assert (row["generated_text"], row["error"]) == (text, None)
    expected = {2: "temperature must be", 3: "a row must have one of", 4: "temprature"}
    for n, words in expected.items():
        assert words in answered[n]["error"] and answered[n]["generated_text"] is None


@pytest.mark.parametrize(
    "options, error",
    [
        (["-i", "none.jsonl", "-o", "out.jsonl"], "--input-file: cannot read none.jsonl"),
        (["-i", "in.jsonl", "-o", "no/out.jsonl"], "--output-file: cannot write no/out.jsonl"),
        (["-i", "in.jsonl", "-o", "in.jsonl"], "it is the input file"),
        (["-i", "in.jsonl", "-o", "out.jsonl", "--max-concurrency", "0"], "at least 1, got 0"),
        (["-i", "in.jsonl", "-o", "out.jsonl", "--port", "8000"], "--port needs --join"),
        (["-i", "in.jsonl", "-o", "out.jsonl", "--join", "-dp", "2"], "--num-replicas with --join"),
        (["-i", "in.jsonl", "-o", "out.jsonl", "--join", "-tp", "2"], "the engines are the server"),
        (["-i", "in.jsonl", "-o", "out.jsonl", "--host", "a"], "unrecognized arguments|unknown"),
    ],
)
def test_what_is_wrong_is_said(
    options: list[str],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", asked("a", prompt="a"))
    assert main(["run-batch", *options]) == 2
    assert re.search(error, capsys.readouterr().err)
    assert os.listdir(tmp_path) in (
        ["in.jsonl"],
        ["out.jsonl", "in.jsonl"],
        ["in.jsonl", "out.jsonl"],
    )
