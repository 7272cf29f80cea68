"""``make demo``: a server with the embedded model, what its clients see, and its end."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai

from deploy.ports import free_ports

PORT = 8000
SHOWN = (
    "manta:prompt_tokens_total", "manta:generation_tokens_total", "manta:request_success_total",
    "manta:time_to_first_token_seconds_count", "manta:time_to_first_token_seconds_sum",
    "manta:inter_token_latency_seconds_count", "manta:inter_token_latency_seconds_sum",
    "manta:num_requests_running", "manta:kv_cache_usage_perc",
)  # fmt: skip


def main() -> int:
    port = PORT if is_free(PORT) else free_ports(1)[0]
    print(f"$ manta serve --port {port}")
    command = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port)]
    with tempfile.NamedTemporaryFile(prefix="manta-demo-", suffix=".log") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            started = time.perf_counter()
            wait_until_ready(server, port)
            print(f"Ready after {time.perf_counter() - started:.1f} s.")
            show(f"http://localhost:{port}")
        except BaseException:
            print(Path(log.name).read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
            raise
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(120)
    print(f"The server has stopped with status {status}.")
    return status


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def show(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    print(f"\nA chat with {model} through the OpenAI client, streamed:\n")
    messages: list[dict[str, str]] = []
    for question in ("What is manta?", "What is the capital of France?", "Tell me a joke."):
        print(f"> {question}")
        messages.append({"role": "user", "content": question})
        started = time.perf_counter()
        first = 0.0
        parts = []
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            temperature=0,
            stream=True,  # type: ignore[arg-type]
        )
        for chunk in stream:
            if text := chunk.choices[0].delta.content:
                first = first or time.perf_counter() - started
                parts.append(text)
                print(text, end="", flush=True)
        seconds = time.perf_counter() - started
        print(f"\n  (first token after {first * 1000:.0f} ms, {seconds * 1000:.0f} ms in all)\n")
        messages.append({"role": "assistant", "content": "".join(parts)})

    show_call(client, model)
    prompts = [
        "Hello, my name is", "The president of the United States is",
        "The capital of France is", "The future of AI is",
    ]  # fmt: skip
    print("Four completions in one request:\n")
    answer = client.completions.create(
        model=model, prompt=prompts, max_tokens=24, temperature=0.8, top_p=0.95, seed=0
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        print(f"  {prompt!r} -> {choice.text!r}")

    print(f"\nSome of {url}/metrics:\n")
    with urllib.request.urlopen(f"{url}/metrics") as response:
        for line in response.read().decode().splitlines():
            if line.startswith(SHOWN):
                print(f"  {line}")
    print()


def show_call(client: openai.OpenAI, model: str) -> None:
    """The model calls a tool, and answers with what that gives."""
    print("A tool:\n")
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    question = "What is the weather in Paris?"
    messages: list[Any] = [{"role": "user", "content": question}]
    asked: Any = {"model": model, "messages": messages, "tools": [tool], "temperature": 0}
    print(f"> {question}")
    message = client.chat.completions.create(**asked).choices[0].message
    messages.append(message)
    for call in message.tool_calls or []:
        result = "21 degrees"
        print(f"  {call.function.name} {call.function.arguments} -> {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print(f"{client.chat.completions.create(**asked).choices[0].message.content}\n")


if __name__ == "__main__":
    sys.exit(main())
