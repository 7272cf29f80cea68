"""The access log and JSON lines of a real server: what clients were told is what was logged, and
nothing that is theirs."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.log import TextLines
from tests.support.served import serve
from tests.support.server import serving
from tests.support.waiting import PATIENCE, until

KEY = "sk-a-key-of-the-tests"
SECRET = "the secret word is swordfish"
AUTH = {"Authorization": f"Bearer {KEY}"}


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_every_line_is_json_and_each_request_has_one(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    options = ["--log-format", "json", "--access-log", "--num-ingress-replicas", "2"]
    options += ["--api-key-file", str(keys), "--max-model-len", "512"]
    with serve(*options) as server:
        url = f"{server.url}/v1"
        told = {}
        for number in range(8):
            body = {"model": "manta-demo", "prompt": f"{SECRET} {number}", "n": 2, "max_tokens": 9,
                    "ignore_eos": True}  # fmt: skip
            headers = {**AUTH, "X-Request-Id": f"own-{number}"}
            answer = httpx.post(f"{url}/completions", json=body, headers=headers, timeout=PATIENCE)
            told[f"own-{number}"] = answer.json()["usage"]
        long = {"model": "manta-demo", "prompt": SECRET, "max_tokens": 450, "ignore_eos": True,
                "stream": True}  # fmt: skip
        gone = {**AUTH, "X-Request-Id": "gone"}
        with httpx.stream("POST", f"{url}/completions", json=long, headers=gone) as stream:
            next(stream.iter_raw())
        wrong = {**AUTH, "X-Request-Id": "wrong"}
        assert httpx.post(f"{url}/completions", json={"n": 0}, headers=wrong).status_code == 400
        assert httpx.get(f"{url}/models").status_code == 401

        def access() -> list[dict[str, Any]]:
            return [line for line in lines(server.log) if line["logger"] == "manta.access"]

        until(lambda: len(access()) == 11, PATIENCE)
        by_id = {line.get("request_id"): line for line in access()}
        for name, usage in told.items():
            line = by_id[name]
            assert (line["method"], line["path"]) == ("POST", "/v1/completions")
            assert (line["status"], line["finish_reason"]) == (200, "length")
            assert line["prompt_tokens"] == usage["prompt_tokens"]
            assert line["output_tokens"] == usage["completion_tokens"] == 18
            assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
            assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
            assert line["client"] == "127.0.0.1" and line["level"] == "info"
        assert by_id["gone"]["finish_reason"] == "gone"
        assert 0 < by_id["gone"]["output_tokens"] < 450
        assert by_id["wrong"]["status"] == 400 and "output_tokens" not in by_id["wrong"]
        (stranger,) = [line for line in access() if line["status"] == 401]
        assert stranger["path"] == "/v1/models" and stranger["request_id"]  # HAProxy's own
        assert len({line["pid"] for line in access()}) <= 2
        text = server.log.read_text()
    every = [json.loads(line) for line in text.splitlines()]
    assert {"manta.serve", "manta.replica", "manta.access"} <= {line["logger"] for line in every}
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in every)
    assert KEY not in text and SECRET not in text and "swordfish" not in text


def test_lines_for_people_have_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), serving({"access_log": True}) as server:
        body = {"model": "manta-demo", "prompt": SECRET, "max_tokens": 3}
        headers = {"X-Request-Id": "mine"}
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        for path in ("/health", "/metrics", "/dashboard", "/dashboard/data"):
            assert httpx.get(server.url + path).status_code == 200
        assert httpx.get(f"{server.url}/nothing").status_code == 404
    first, second = (TextLines().format(r) for r in caplog.records if r.name == "manta.access")
    assert re.search(
        r"^INFO .* \[manta.access\] request method=POST path=/v1/completions status=200"
        r" request_id=mine client=127.0.0.1 prompt_tokens=\d+ cached_tokens=0 output_tokens=3"
        r" finish_reason=length preemptions=0 queue_seconds=\d.* seconds=\d", first
    ), first  # fmt: skip
    assert " method=GET path=/nothing status=404 client=127.0.0.1 seconds=" in second
