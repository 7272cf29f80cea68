"""manta chat, manta complete and manta bench serve, against ``manta serve``."""

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from deploy.bench_serve import arrivals
from deploy.cli import main
from deploy.ports import free_ports
from tests.support.served import ROOT, Served, serve
from tests.support.waiting import PATIENCE

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serve() as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def run(server: Served, command: str, *argv: str) -> int:
    """A client's command in this process."""
    return main([command, "--url", f"{server.url}/v1", *argv])


def test_a_batch_of_the_servers_engines(server: Served, tmp_path: Path) -> None:
    body = {"model": "manta-demo", "prompt": "The capital of France is", "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))

    def generated() -> float:
        text = httpx.get(f"{server.url}/metrics").text
        return float(re.findall(r"^manta:generation_tokens_total.* (\S+)$", text, re.M)[0])

    before = generated()
    command = ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--join", "--port"]
    subprocess.run(
        [sys.executable, "-m", "deploy.cli", *command, str(server.port)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert answer["response"]["status_code"] == 200
    assert generated() == before + 2


def chat_text(client: openai.OpenAI, *contents: str, **options: object) -> str:
    """What the model says, greedily, to messages of user and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    answer = client.chat.completions.create(  # type: ignore[call-overload]
        model="manta-demo", messages=messages, temperature=0, **options
    )
    return str(answer.choices[0].message.content)


# ---- chat, complete ----


def test_one_question(server: Served, client: openai.OpenAI, capsys: pytest.CaptureFixture[str]):
    assert run(server, "chat", "-q", QUESTION, "--temperature", "0", "--stats") == 0
    text, stats = capsys.readouterr().out.splitlines()
    assert text == chat_text(client, QUESTION)
    assert stats.startswith("[first token after ") and stats.endswith(" tok/s]")
    assert run(server, "chat", "-q", QUESTION, "--temperature", "0", "--system-prompt", "Hi.") == 0
    assert capsys.readouterr().out.strip()
    argv = ["-q", "The capital of France is", "--temperature", "0", "--max-tokens", "7"]
    assert run(server, "complete", *argv) == 0
    completion = client.completions.create(
        model="manta-demo", prompt=argv[1], temperature=0, max_tokens=7
    )
    assert capsys.readouterr().out == completion.choices[0].text + "\n"


def test_sampling_options_reach_the_server(
    server: Served, client: openai.OpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "max_tokens": 20,
               "repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2,
               "seed": 11}  # fmt: skip
    argv = [word for n, v in options.items() for word in ("--" + n.replace("_", "-"), str(v))]
    extra = {name: options.pop(name) for name in ("top_k", "min_p", "repetition_penalty")}
    expected = client.completions.create(  # type: ignore[call-overload]
        model="manta-demo", prompt="Once", extra_body=extra, **options
    )
    for _ in range(2):
        assert run(server, "complete", "--quick", "Once", *argv) == 0
        assert capsys.readouterr().out == expected.choices[0].text + "\n"


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_conversation_in_a_pipe(
    server: Served,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "/temp 0", "Hello", QUESTION, "/undo", "Tell me \\", "a joke.", "", "/retry",
        f"/save {file}", "/clear", "/system Be short.", f"/load {file}", "And now?",
        "/system off", "/model manta-demo", "/stats", "/stats", "/help", "/exit", "never sent",
    ]  # fmt: skip
    pipe(monkeypatch, "\n".join(lines))
    assert run(server, "chat") == 0
    hello = chat_text(client, "Hello")
    capital = chat_text(client, "Hello", hello, QUESTION)
    joke = chat_text(client, "Hello", hello, "Tell me \na joke.")
    now = chat_text(client, "Hello", hello, "Tell me \na joke.", joke, "And now?")
    out = capsys.readouterr().out
    assert out.startswith(
        f"(temperature: 0.0)\n{hello}\n{capital}\n(1 messages)\n{joke}\n{joke}\n"
        f"(saved to {file})\n(forgotten)\n(system prompt: Be short.)\n(2 messages)\n{now}\n"
        "(system prompt: none)\n(model: manta-demo)\n(stats on)\n(stats off)\n"
    )
    saved = json.loads(file.read_text())
    assert [m["content"] for m in saved] == ["Hello", hello, "Tell me \na joke.", joke]
    for name in ("help", "clear", "system", "undo", "retry", "temp", "model", "save", "load"):
        assert f"\n  /{name} " in out


def test_completions_in_a_pipe(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for text in ("one\n\ntwo\n", "one", "two"):
        pipe(monkeypatch, text)
        assert run(server, "complete", "--temperature", "0", "--max-tokens", "5") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] + outputs[2]


class Terminal:
    """``manta chat`` at a terminal."""

    def __init__(self, *argv: str) -> None:
        self.process, self._master = self._spawn([sys.executable, "-m", "deploy.cli", *argv])
        self.seen = ""

    @staticmethod
    def _spawn(command: list[str]) -> tuple["subprocess.Popen[bytes]", int]:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
            # A shell starts what it puts into the background deaf to Ctrl-C: so may be the tests.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)
        return process, master

    def wait_for(self, text: str) -> str:
        """What is shown up to ``text``."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self._master], [], [], deadline - time.monotonic())
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self._master, 65536).decode()
            except OSError:  # the program has ended
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def write(self, line: str) -> None:
        os.write(self._master, line.encode())

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)


def running(server: Served) -> int:
    engines = httpx.get(f"{server.url}/load").json()["engines"]
    return sum(engine["running"] for engine in engines)


def test_at_a_terminal_ctrl_c_stops_an_answer_and_not_the_program(server: Served) -> None:
    # With this seed nothing ends the answer but its length, far away.
    terminal = Terminal(
        "chat", "--url", f"{server.url}/v1", "--temperature", "50", "--max-tokens", "2000",
        "--seed", "2",
    )  # fmt: skip
    assert f"manta-demo at {server.url}/v1" in terminal.wait_for("> ")
    terminal.write("Tell me all you know.\n")
    terminal.wait_for("know.\r\n")
    terminal.wait_for(" ")  # the answer has begun
    deadline = time.monotonic() + PATIENCE
    terminal.interrupt()
    terminal.wait_for("[stopped]")
    terminal.wait_for("> ")
    while running(server):
        assert time.monotonic() < deadline
    terminal.write("/nonsense\n")
    terminal.wait_for("error: there is no command /nonsense")
    terminal.wait_for("> ")
    terminal.write("half a li")
    terminal.wait_for("half a li")
    time.sleep(0.3)  # readline loses a signal that comes while it takes in a character
    terminal.interrupt()
    terminal.wait_for("(/exit or Ctrl-D leaves)")
    terminal.write("/undo\n")
    terminal.wait_for("(0 messages)")
    terminal.wait_for("> ")
    terminal.write("\x04")
    assert terminal.process.wait(PATIENCE) == 0


def half_a_server(answer: bytes) -> str:
    """The URL of something that gives every request the same bytes, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer_all() -> None:
        while True:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # closed with bytes unread it would be a reset
                pass
            connection.close()

    threading.Thread(target=answer_all, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices": [{"index": 0, "text": "half an"}]}\n\n'


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_errors_are_one_line(
    server: Served,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"{server.url}/v1"
    for argv, message in (
        (["--url", "http://127.0.0.1:9/v1"], "no answer from http://127.0.0.1:9/v1: "),
        (["--url", "localhost:8000"], "must start with http:// or https://"),
        (["--url", server.url], "404"),
        (["--url", url, "--model", "nobody"], "404: the model 'nobody' does not exist"),
        (["--url", url, "--max-tokens", "9999"], "the server answered 400: "),
        (["--url", url, "--temperature", "-1"], "the server answered 400: "),
        (["--url", url, "--temperatur", "1"], "did you mean --temperature?"),
        (["--url", half_a_server(EVENTS + TOKEN), "--model", "m"], "broke off in the middle"),
        (
            ["--url", half_a_server(EVENTS + b'data: {"error": {"message": "no memory"}}\n\n'),
             "--model", "m"],
            "no memory",
        ),
        (["--url", half_a_server(b"HTTP/1.1 200 OK\r\n\r\n<html>")], "gave no JSON"),
        (["--url", half_a_server(b'HTTP/1.1 200 OK\r\n\r\n{"data": []}')], "no list of models"),
    ):  # fmt: skip
        assert main([command, "-q", "x", *argv]) == 2
        out, err = capsys.readouterr()
        assert out in ("", "half an\n")
        assert err.startswith("manta: error: ") and err.count("\n") == 1 and message in err
    pipe(monkeypatch, "x\nx\n")
    assert run(server, command, "--max-tokens", "9999") == 2
    assert capsys.readouterr().err.count("the server answered 400") == 1


def test_chat_commands_say_what_is_wrong(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, message in (
        ("/temp hot", "/temp takes a number of at least 0, got 'hot'"),
        ("/retry", "nothing to answer anew"),
        ("/save", "/save takes the name of a file"),
        ("/save /no/such/folder/f", "/save cannot write '/no/such/folder/f': No such file"),
        ("/load /no/such/file", "/load cannot read '/no/such/file'"),
        ("/load pyproject.toml", "/load cannot read 'pyproject.toml'"),
        ("/speak", "there is no command /speak; there are /help /clear"),
    ):
        pipe(monkeypatch, line)
        assert run(server, "chat") == 2
        assert message in capsys.readouterr().err


def test_the_key_comes_from_an_option_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    def refuse() -> None:
        while True:
            connection, _ = listener.accept()
            seen.append(connection.recv(65536).decode().lower())
            connection.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
            connection.close()

    threading.Thread(target=refuse, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "from-openai")
    assert main(["chat", "--url", url, "-q", "x"]) == 2
    monkeypatch.setenv("MANTA_API_KEY", "from-manta")
    assert main(["chat", "--url", url, "-q", "x"]) == 2
    assert main(["chat", "--url", url, "-q", "x", "--api-key", "given"]) == 2
    assert main(["bench", "serve", "--base-url", url[:-3]]) == 2
    keys = [head.split("authorization: bearer ")[1].split("\r\n")[0] for head in seen]
    assert keys == ["from-openai", "from-manta", "given", "from-manta"]
    assert "the server answered 401: No" in capsys.readouterr().err


# ---- bench serve ----


def bench(server: Served, file: Path, *argv: str) -> dict[str, object]:
    """The figures of a run."""
    command = ["bench", "serve", "--base-url", server.url, "--result-filename", str(file)]
    assert main([*command, "--disable-tqdm", *argv]) == 0
    found: dict[str, object] = json.loads(file.read_text().splitlines()[-1])
    return found


def test_bench_counts_what_the_server_counts(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(
        server, tmp_path / "f.json", "--num-prompts", "12", "--max-concurrency", "3",
        "--random-input-len", "20", "--random-output-len", "9", "--num-warmups", "2",
        "--goodput", "ttft:100000", "e2el:100000", "itl:100000", "tpot:100000",
        "--metadata", "machine=mine", "--save-detailed",
    )  # fmt: skip
    assert (found["completed"], found["failed"]) == (12, 0)
    assert found["input_lens"] == [20] * 12 and found["total_input_tokens"] == 240
    assert found["output_lens"] == [9] * 12 and found["total_output_tokens"] == 108
    assert found["max_concurrent_requests"] == 3
    seconds = found["duration"]
    assert isinstance(seconds, float)
    assert found["output_throughput"] == pytest.approx(108 / seconds)
    assert found["total_token_throughput"] == pytest.approx(348 / seconds)
    assert found["request_goodput"] == found["request_throughput"] == pytest.approx(12 / seconds)
    assert (found["machine"], found["model_id"]) == ("mine", "manta-demo")
    for metric in ("ttft", "tpot", "itl", "e2el"):
        values = [found[f"{name}_{metric}_ms"] for name in ("p50", "p90", "p99")]
        assert values == sorted(values) and 0 < values[0] == found[f"median_{metric}_ms"]
    assert found["finish_reasons"] == ["length"] * 12
    out = capsys.readouterr().out
    for line in ("Successful requests:                     12", "P99 TTFT (ms):", "goodput"):
        assert line in out
    found = bench(
        server, tmp_path / "f.json", "--num-prompts", "2", "--goodput", "e2el:0.001",
        "--input-len", "5", "--output-len", "3", "--append-result",
    )  # fmt: skip
    assert found["request_goodput"] == 0
    assert len((tmp_path / "f.json").read_text().splitlines()) == 2


def test_bench_reads_files(server: Served, tmp_path: Path) -> None:
    talks = [
        {
            "conversations": [
                {"from": "human", "value": f"Say {i}."},
                {"from": "gpt", "value": "word " * i},
            ]
        }
        for i in range(1, 4)
    ]
    talks.append({"messages": [{"role": "system", "content": "s"},
                               {"role": "user", "content": "Say 4."},
                               {"role": "assistant", "content": "word word"}]})  # fmt: skip
    answers = ["word " * i for i in range(1, 4)] + ["word word"]
    sharegpt = tmp_path / "talks.json"
    sharegpt.write_text(json.dumps([*talks, {"conversations": []}]))
    common = ["--ignore-eos", "--disable-shuffle", "--save-detailed"]
    found = bench(
        server, tmp_path / "f", "--dataset-name", "sharegpt", "--dataset-path", str(sharegpt),
        "--num-prompts", "6", *common,
    )  # fmt: skip
    lengths = [
        httpx.post(
            f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}
        ).json()["count"]
        for text in answers
    ]
    assert found["output_lens"] == (lengths * 2)[:6]
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo\n")
    jsonl = tmp_path / "prompts.jsonl"
    jsonl.write_text('{"prompt": "one", "output_tokens": 4}\n{"prompt": "two"}\n')
    for file, extra, expected in (
        (lines, ["--output-len", "5"], [5, 5, 5]),
        (jsonl, [], [4, 256, 4]),
        (jsonl, ["--custom-output-len", "2", "--tokenizer", "deploy/demo_model"], [2, 2, 2]),
    ):
        found = bench(
            server, tmp_path / "f", "--dataset-path", str(file), "--num-prompts", "3",
            *common, *extra,
        )  # fmt: skip
        assert found["output_lens"] == expected


def test_bench_chats(server: Served, tmp_path: Path) -> None:
    found = bench(
        server, tmp_path / "f", "--backend", "openai-chat", "--num-prompts", "3",
        "--input-len", "10", "--output-len", "6", "--save-detailed", "--temperature", "0",
        "--request-rate", "100", "--burstiness", "0.5", "--max-concurrency", "2",
        "--percentile-metrics", "ttft,client_queue_time", "--metric-percentiles", "99.9",
    )  # fmt: skip
    assert found["output_lens"] == [6, 6, 6]
    texts = found["generated_texts"]
    assert isinstance(texts, list) and all(texts)
    assert "p99.9_client_queue_time_ms" in found and "mean_itl_ms" not in found


def test_arrivals_have_the_rate_and_burstiness_asked_for() -> None:
    assert arrivals(3, float("inf"), 1, 0) == [0, 0, 0]
    spread = {}
    for burstiness in (0.25, 1.0, 4.0):
        times = arrivals(4000, 8.0, burstiness, 1)
        assert times == sorted(times) and times[-1] == pytest.approx(500)
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        mean = sum(gaps) / len(gaps)
        spread[burstiness] = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean
    # A gamma distribution's spread is 1 / sqrt(shape) of its mean; 1 is a Poisson process.
    for burstiness, value in spread.items():
        assert value == pytest.approx(burstiness**-0.5, rel=0.1)


def test_failed_requests_are_counted_and_named(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        '{"prompt": "a", "output_tokens": 3}\n{"prompt": "b", "output_tokens": 9999}\n'
    )
    found = bench(server, tmp_path / "f", "--dataset-path", str(prompts), "--num-prompts", "4")
    assert (found["completed"], found["failed"]) == (2, 2)
    assert "2 of 4 requests failed: 400: " in capsys.readouterr().err
    argv = [
        "bench",
        "serve",
        "--base-url",
        server.url,
        "--output-len",
        "9999",
        "--num-prompts",
        "2",
    ]
    assert main([*argv, "--disable-tqdm"]) == 2
    assert "every request failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["--max-concurrency", "0"], "--max-concurrency must be at least 1"),
        (["--request-rate", "0"], "--request-rate must be over 0"),
        (["--burstiness", "0.5"], "--burstiness needs --request-rate"),
        (["--dataset-name", "sharegpt"], "--dataset-name sharegpt needs --dataset-path"),
        (["--dataset-path", "x", "--input-len", "5"], "--input-len needs --dataset-name random"),
        (["--dataset-name", "random", "--dataset-path", "x"], "--dataset-path needs"),
        (["--random-range-ratio", "1"], "--random-range-ratio must be from 0 to below 1"),
        (["--base-url", "localhost"], "--base-url must start with http://"),
        (["--endpoint", "/v1/chat/completions"], "does not fit --backend openai"),
        (["--goodput", "ttft"], "--goodput must be NAME:VALUE, got 'ttft'"),
        (["--goodput", "speed:5"], "--goodput must be of ttft, tpot, e2el, itl, got 'speed'"),
        (["--goodput", "ttft:fast"], "--goodput ttft must be milliseconds, got 'fast'"),
        (["--percentile-metrics", "ttft,x"], "--percentile-metrics must be of"),
        (["--metric-percentiles", "50,101"], "--metric-percentiles must be numbers from 0 to 100"),
        (["--extra-body", "[1]"], "--extra-body must be a JSON object"),
        (["--header", "x"], "--header must be NAME=VALUE, got 'x'"),
        (["--result-dir", "/no/such"], "there is no folder /no/such"),
        (["--num-promts", "5"], "unknown option --num-promts; did you mean --num-prompts?"),
        (["--port", str(free_ports(1)[0])], "no answer from http://127.0.0.1:"),
    ],
)
def test_bench_options_are_checked(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("manta: error: ") and message in err


def test_bench_files_are_checked(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text, message in (
        ("none.txt", None, "cannot read"),
        ("empty.txt", "", "has no prompts"),
        ("bad.json", "{", "is not as expected"),
        ("list.json", "[1]", "is not as expected"),
        ("nameless.jsonl", '{"text": "x"}', "is not as expected"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        argv = ["--base-url", server.url, "--dataset-path", str(tmp_path / name)]
        assert main(["bench", "serve", *argv]) == 2
        assert message in capsys.readouterr().err
