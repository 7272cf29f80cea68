"""The schedule log and ``manta replay``, on a real model."""

import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.cli import main
from engine import wire
from engine.continuation import begin
from engine.errors import ConfigError
from engine.plan import StepPlan, StepResult
from engine.schedule_log import FORMAT, ScheduleLog
from manta import LLM, SamplingParams
from tests.support.tiny_llm import start_llm
from tests.support.tiny_tokenizer import save_tokenizer
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 128


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words"), VOCAB)


@pytest.fixture(scope="module")
def log(checkpoint, tokenizer, tmp_path_factory):
    """The log of a run with everything that a scheduler may do, and what its requests brought."""
    path = tmp_path_factory.mktemp("log") / "run.log"
    llm = start_llm(
        checkpoint("llama"), tokenizer, schedule_log=str(path), num_gpu_blocks_override=18,
        max_model_len=180, max_num_batched_tokens=32,
    )  # fmt: skip
    engine, rng = llm.engine, random.Random(0)
    stem = [rng.randrange(3, VOCAB) for _ in range(48)]
    outputs: dict[str, list[int]] = {}
    for number in range(16):
        prompt = stem * (number % 2) + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 60))]
        sampling = SamplingParams(
            temperature=1.0, max_tokens=rng.randint(20, 90), seed=number, n=1 + number % 2,
            logprobs=2 if number % 3 == 0 else None,
        )  # fmt: skip
        engine.add(begin(request_id=f"r{number}", prompt_token_ids=prompt, sampling=sampling))
    steps = 0
    while engine.has_work:
        steps += 1
        mode = "swap" if steps % 6 < 3 else "recompute"
        engine.scheduler.config = replace(engine.scheduler.config, preemption_mode=mode)
        if steps % 25 == 0:
            engine.abort(f"r{steps // 25 + 4}")
        for name, outcome in engine.step():
            if outcome.tokens:
                outputs.setdefault(name, []).extend(outcome.tokens)
    stats, kv = engine.scheduler.stats, engine.scheduler.kv.stats
    assert stats.preemptions_swap and stats.preemptions_recompute and kv.prefix_hits
    engine.stop()
    return path, outputs


def records(path):
    return list(ScheduleLog(path).records())


def rewrite(path, target, change):
    """A copy of a log with ``change`` of every value."""
    log = ScheduleLog(path)
    values = [(0, log.header)]
    values += [(1 if isinstance(r, StepPlan) else 2, change(r)) for r in log.records()]
    with open(target, "wb") as file:
        file.write(FORMAT)
        for kind, value in values:
            data = wire.encode(value)
            file.write(struct.pack("<IB", len(data), kind) + data)


def test_a_run_replays_identically(log, capsys):
    path, outputs = log
    found = records(path)
    results = [r for r in found if isinstance(r, StepResult)]
    tokens = sum(len(r.tokens) for r in results)
    assert tokens >= sum(map(len, outputs.values()))
    assert main(["replay", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"{len(results):,} steps, {tokens:,} tokens: all as logged" in shown
    assert "note" not in shown
    assert path.stat().st_size / len(results) < 2000  # it is compact


def test_the_first_other_token_is_reported_where_it_is(log, capsys, tmp_path):
    path, _ = log
    results = [r for r in records(path) if isinstance(r, StepResult) and len(r.tokens) > 2]
    changed = results[len(results) // 2]
    right = int(changed.tokens[1])
    wrong = (right + 1) % VOCAB

    def change(record):
        if isinstance(record, StepResult) and record.step >= changed.step:
            tokens = record.tokens.copy()
            tokens[1:] = (tokens[1:] + 1) % VOCAB  # later ones are not reported
            return replace(record, tokens=tokens)
        return record

    rewrite(path, tmp_path / "changed", change)
    assert main(["replay", str(tmp_path / "changed")]) == 1
    shown = capsys.readouterr().out
    (plan,) = (r for r in records(path) if isinstance(r, StepPlan) and r.step == changed.step)
    slot = int(plan.slots[changed.rows[1]])
    assert f"step {changed.step}, slot {slot}, request r" in shown
    assert shown.endswith(f": expected token {wrong}, got token {right}\n")
    # The request is the one that was admitted to that slot last.
    names = {}
    for record in records(path):
        if isinstance(record, StepPlan) and record.step <= changed.step:
            names.update({admit.slot: admit.name for admit in record.admits})
    assert f"request {names[slot]}, position" in shown


def test_another_models_tokens_differ(log, capsys, tmp_path, checkpoint):
    path, _ = log
    assert main(["replay", str(path), "--model", str(checkpoint("llama-yarn"))]) == 1
    shown = capsys.readouterr().out
    assert "is not the one that was logged" in shown
    assert re.search(r"step \d+, slot \d+, request r\d+/\d, position \d+: expected token", shown)


def test_the_backend_may_be_another(log, capsys):
    path, _ = log
    assert main(["replay", str(path), "--attention-backend", "gather", "--dtype", "float32"]) == 0
    capsys.readouterr()


def test_a_log_that_is_cut_off_is_replayed_up_to_there(log, capsys, tmp_path):
    path, _ = log
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[:-7])
    results = [r for r in records(path) if isinstance(r, StepResult)]
    assert main(["replay", str(cut)]) == 0
    shown = capsys.readouterr().out
    assert "the last record is cut off" in shown
    assert f"{len(results) - 1:,} steps" in shown
    assert "the last 1 steps have no result" in shown


def test_an_engine_that_is_killed_leaves_a_log(checkpoint, tokenizer, capsys, tmp_path):
    path = tmp_path / "killed.log"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "deploy.cli", "generate", "--tokenizer", str(tokenizer),
            "--device", "cpu", "--dtype", "float32", "--swap-space", "0.001",
            "--kv-cache-memory-bytes", "8000000", "--schedule-log", str(path), "--ignore-eos",
            "--max-tokens", "200", str(checkpoint("llama")), *["w3 w4 w5"] * 50,
        ],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while not (path.exists() and path.stat().st_size > 20_000):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert main(["replay", str(path)]) == 0
    assert "all as logged" in capsys.readouterr().out


def test_a_log_that_is_there_is_not_overwritten(checkpoint, tokenizer, tmp_path):
    path = tmp_path / "log"
    path.write_text("mine")
    llm = start_llm(checkpoint("llama"), tokenizer, schedule_log=str(path))
    llm.generate([[3, 4]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert path.read_text() == "mine"
    assert len(records(tmp_path / "log.1")) == 4
    with pytest.raises(ConfigError, match="schedule_log must be a file that can be written"):
        start_llm(checkpoint("llama"), tokenizer, schedule_log=str(tmp_path / "none" / "log"))


def test_a_disk_that_is_full_stops_the_log_and_not_the_engine(checkpoint, tokenizer, caplog):
    llm: LLM = start_llm(checkpoint("llama"), tokenizer, schedule_log="/dev/shm/manta-full.log")
    recorder = llm.engine.executor
    try:
        recorder._file.close()
        recorder._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        (output,) = llm.generate([[3, 4]], SamplingParams(max_tokens=3), use_tqdm=False)
        assert output.finished
        assert "nothing more is logged there" in caplog.text
    finally:
        recorder.path.unlink()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"hello", "is no schedule log of this version"),
        (FORMAT, "has no header"),
        (FORMAT + struct.pack("<IB", 3, 0) + b"abc", "the record at byte 26 is damaged"),
    ],
)
def test_what_is_no_log_is_refused(content, message, capsys, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(content)
    assert main(["replay", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert "cannot read the schedule log" in capsys.readouterr().err
