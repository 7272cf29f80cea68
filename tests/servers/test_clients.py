"""The clients that people have, against ``manta serve``: answers, streams, their own exceptions."""

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from tests.support.served import Served, serve
from tests.support.waiting import PATIENCE

KEY = "sesame"
MODEL = "manta-demo"
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
LONG = "word " * 5000
NODE = Path(__file__).resolve().parents[1] / "node"
SEQUENCES, QUEUED = 2, 8
# How each further request finds the engine: running, waiting.
BUSY = [(1, 0), *((SEQUENCES, n) for n in range(QUEUED + 1))]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    options = ["--max-num-seqs", str(SEQUENCES), "--max-queued-requests", str(QUEUED)]
    with serve("--api-key", KEY, *options) as served:
        yield served


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@contextmanager
def busy(server: Served) -> Iterator[None]:
    """The server with all that it runs and queues taken; at the end their clients vanish."""
    body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": 1900, "ignore_eos": True})
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with ExitStack() as stack:
        for running, waiting in BUSY:
            connection = socket.create_connection(("127.0.0.1", server.port))
            stack.enter_context(connection)
            connection.sendall((head + body).encode())
            wait_until(server, running, waiting)
        yield
    wait_until(server, 0, 0)


def wait_until(server: Served, running: int, waiting: int) -> None:
    """Until the engine has so much to do."""
    headers = {"Authorization": f"Bearer {KEY}"}
    deadline = time.monotonic() + PATIENCE
    while True:
        (load,) = httpx.get(f"{server.url}/load", headers=headers).json()["engines"]
        if (load["running"], load["waiting"]) == (running, waiting):
            return
        assert time.monotonic() < deadline, load
        time.sleep(0.02)


# ---- openai for Python ----


def test_openai_python(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    text = answer.choices[0].message.content
    assert text and "Paris" in text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.completion_tokens > 3
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == answer.usage
    completion = client.completions.create(
        model=MODEL, prompt=[QUESTION, "Hello"], max_tokens=5, n=2, seed=3, logprobs=1
    )
    assert len(completion.choices) == 4
    assert all(len(choice.logprobs.tokens) <= 5 for choice in completion.choices)


def test_openai_python_async(server: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, n: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=f"{n} and", max_tokens=12, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> tuple[list[str], list[str]]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            alone = [await ask(client, n) for n in range(6)]
            together = await asyncio.gather(*(ask(client, n) for n in range(6)))
            return alone, list(together)

    alone, together = asyncio.run(run())
    assert alone == together and len(set(alone)) > 1


def test_openai_python_errors(server: Served, client: openai.OpenAI) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as unauthorized:
        stranger.models.list()
    assert unauthorized.value.status_code == 401
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="x")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="2,?048") as too_long:
            client.completions.create(model=MODEL, prompt=LONG, max_tokens=5, stream=stream)
        assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokenz"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"max_tokenz": 5})
    with busy(server), pytest.raises(openai.RateLimitError) as too_many:
        client.completions.create(model=MODEL, prompt="x")
    assert int(too_many.value.response.headers["retry-after"]) >= 1


def test_openai_python_waits_and_tries_again(server: Served) -> None:
    """Its own retries obey Retry-After: a full queue costs a user time, and no error."""
    statuses: list[int] = []
    http = httpx.Client(event_hooks={"response": [lambda r: statuses.append(r.status_code)]})
    patient = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=5, http_client=http
    )
    with ThreadPoolExecutor(1) as pool:
        with busy(server):
            answer = pool.submit(patient.completions.create, model=MODEL, prompt="x", max_tokens=1)
            while not statuses and not answer.done():
                time.sleep(0.01)
        assert answer.result().choices
    assert statuses[0] == 429 and statuses[-1] == 200


def test_closing_a_stream_frees_the_server(server: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    wait_until(server, 0, 0)


# ---- openai for Node ----


def node(*argv: str) -> dict[str, object]:
    """What the script found."""
    assert shutil.which("node"), "Node.js is needed: apt-get install nodejs npm"
    assert (NODE / "node_modules/openai").is_dir(), "run: npm ci --prefix tests/node"
    done = subprocess.run(
        ["node", str(NODE / "client.mjs"), *argv], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_openai_node(server: Served, client: openai.OpenAI) -> None:
    found = node(server.url, KEY)
    expected = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    text = expected.choices[0].message.content
    assert found["models"] == [MODEL]
    assert found["chat"] == found["streamed"] == found["helper"] == text
    assert found["chatUsage"] == found["streamUsage"]
    completion = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert found["completion"] == completion.choices[0].text
    assert found["logprobs"] == found["completionTokens"]
    assert found["beforeAbort"] in (3, 4)
    wait_until(server, 0, 0)
    for name, kind, status, code in (
        ("unauthorized", "AuthenticationError", 401, "invalid_api_key"),
        ("tooLong", "BadRequestError", 400, "context_length_exceeded"),
        ("noModel", "NotFoundError", 404, "model_not_found"),
    ):
        error = found[name]
        assert isinstance(error, dict)
        assert (error["type"], error["status"], error["code"]) == (kind, status, code)
    assert "max_tokenz" in str(found["unknownField"])
    with busy(server):
        error = node(server.url, KEY, "busy")["tooMany"]
    assert isinstance(error, dict) and (error["type"], error["status"]) == ("RateLimitError", 429)


# ---- LangChain ----


def chat_openai(server: Served, key: str = KEY, **options: object) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=f"{server.url}/v1", api_key=key, temperature=0, max_retries=0,
        **options,
    )  # type: ignore[arg-type]  # fmt: skip


def test_langchain(server: Served) -> None:
    llm = chat_openai(server)
    messages = [SystemMessage("You are manta."), HumanMessage(QUESTION)]
    answer = llm.invoke(messages)
    assert isinstance(answer.content, str) and answer.content
    assert answer.usage_metadata and answer.usage_metadata["output_tokens"] > 3
    assert "".join(str(chunk.content) for chunk in llm.stream(messages)) == answer.content
    answers = llm.batch([[HumanMessage(QUESTION)]] * 3)
    assert {str(a.content) for a in answers} == {str(llm.invoke(QUESTION).content)}
    limited = llm.bind(max_tokens=2).invoke(QUESTION)
    assert limited.response_metadata["finish_reason"] == "length"


def test_langchain_errors(server: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        chat_openai(server, "wrong").invoke(QUESTION)
    with pytest.raises(ContextOverflowError):
        chat_openai(server).invoke(LONG)
    with busy(server), pytest.raises(openai.RateLimitError):
        chat_openai(server).invoke(QUESTION)


# ---- curl ----


def curl(server: Served, path: str, *options: str, key: str | None = KEY) -> tuple[int, str]:
    """Status and body."""
    auth = [] if key is None else ["-H", f"Authorization: Bearer {key}"]
    done = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", *auth, *options, server.url + path],
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def post(body: object) -> list[str]:
    return ["-H", "Content-Type: application/json", "-d", json.dumps(body)]


def test_curl(server: Served) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "temperature": 0}
    status, text = curl(server, "/v1/chat/completions", *post(body))
    whole = json.loads(text)["choices"][0]["message"]["content"]
    assert status == 200 and "Paris" in whole
    status, text = curl(server, "/v1/chat/completions", "-N", *post({**body, "stream": True}))
    lines = [line for line in text.split("\n") if line]
    assert status == 200 and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == whole
    assert curl(server, "/health", key=None) == (200, "")


def test_curl_errors(server: Served) -> None:
    completion = post({"model": MODEL, "prompt": "x"})
    for options, key, expected in (
        (completion, None, 401),
        (completion, "wrong", 401),
        (post({"model": "nobody", "prompt": "x"}), KEY, 404),
        (post({"model": MODEL, "prompt": LONG}), KEY, 400),
        (post({"model": MODEL, "prompt": "x", "max_tokenz": 1}), KEY, 400),
        (["-H", "Content-Type: application/json", "-d", "{"], KEY, 400),
    ):
        status, text = curl(server, "/v1/completions", *options, key=key)
        error = json.loads(text)["error"]
        assert status == expected and error["message"] and error["type"], text
    with busy(server):
        status, text = curl(server, "/v1/completions", "-i", *completion)
    assert status == 429 and "retry-after:" in text.lower()
