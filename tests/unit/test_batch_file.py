"""Batch files as bytes: what a line is, and what an output file may be."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.batch_file import Answered, Asked, Output, Problem, Response, count, lines
from manta import ConfigError


def line(custom_id: Any, **changes: Any) -> str:
    asked = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"n": 1}}
    return json.dumps(asked | changes) + "\n"


def test_what_is_wrong_with_a_line_is_told_with_its_custom_id(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    same = line("twice")
    parts = ["\ufeff" + line("a"), "\n", "  \r\n", "{not json\n", '["a list"]\n', line(7)]
    parts += [line("more", temperature=1), '{"custom_id": "less"}\n', same, same, same]
    file.write_text("".join(parts), encoding="utf-8")
    found = list(lines(file))
    assert count(file) == len(found) == 9
    first, *wrong, twice, again, third = found
    assert isinstance(first.asked, Asked) and bytes(first.asked.body) == b'{"n": 1}'
    told = [(one.custom_id, one.asked) for one in wrong]
    assert all(isinstance(asked, Problem) and asked.code == "invalid_line" for _, asked in told)
    expected = ["malformed", "Expected `object`", "Expected `str`", "unknown field 'temperature'"]
    expected += ["missing required field 'method'"]
    assert [custom_id for custom_id, _ in told] == [None, None, None, "more", "less"]
    for (_, asked), words in zip(told, expected, strict=True):
        assert isinstance(asked, Problem) and words.replace("`", "'") in asked.message
    assert isinstance(twice.asked, Asked)
    assert (
        again.asked
        == third.asked
        == Problem("duplicate_custom_id", "an earlier line has this custom_id")
    )
    assert len({one.id for one in found}) == 9


def test_an_output_has_what_was_written_and_loses_only_half_a_line(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(line(f"r{i}") for i in range(4)))
    asked = list(lines(source))
    body = msgspec.Raw(b'{"text": "\xc3\xa9"}')
    with Output(target) as output:
        for one in asked[:3]:
            output.add(Answered(one.id, one.custom_id, Response(200, "req", body)))
        with pytest.raises(ConfigError, match="another batch writes"):
            Output(target)
    whole = target.read_bytes()
    first = json.loads(whole.splitlines()[0])
    response = {"status_code": 200, "request_id": "req", "body": {"text": "é"}}
    assert first == {"id": asked[0].id, "custom_id": "r0", "response": response, "error": None}
    for cut in (1, 20, len(whole) // 3 - 1):  # of the last line
        target.write_bytes(whole[:-cut])
        with Output(target) as output:
            assert len(output) == 2
            assert [one in output for one in asked] == [True, True, False, False]
        assert whole.startswith(target.read_bytes()) and target.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    "text", ["precious", "a\nb\n", '{"id": "12"}\n', '{"id": "no"}\n', '{"custom_id": "r"}\n']
)
def test_a_file_that_is_no_output_is_left_alone(text: str, tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text(text)
    with pytest.raises(ConfigError, match="line 1 of .*notes.txt is no line of a batch's output"):
        Output(target)
    assert target.read_text() == text


def test_a_huge_file_is_never_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    with file.open("w") as out:
        for number in range(20_000):
            out.write(line(f"r{number}", body={"prompt": "x" * 1000}))
    tracemalloc.start()
    assert count(file) == sum(isinstance(one.asked, Asked) for one in lines(file)) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < file.stat().st_size / 5
