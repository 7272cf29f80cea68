"""A small load generator for any OpenAI-compatible server; it needs nothing but Python.

    python benchmarks/load_generator.py --url http://127.0.0.1:8000 --model NAME --streams 32

It keeps ``--streams`` connections busy, each sending its next request when its last has ended:
random token ids as prompts, greedy, to the full output length. It looks for the events of a
stream in the bytes as they come and parses none but the last, so that it takes little of the
machine that it shares with the server. One line of JSON: output tokens per second; time to first
token and inter-token latency (from one event to the next) as p50 and p99 in milliseconds; its own
CPU time for each token.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from urllib.parse import urlsplit

EVENT = b"data: {"
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


class Stream(asyncio.Protocol):
    """One connection. ``times`` are when each event of the request in progress came."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, head: bytes, body: bytes) -> "asyncio.Future[None]":
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.times: list[float] = []
        self.tail = b""
        self.tokens = 0
        self.transport.write(head)  # one by one, as httpx and OpenAI's client send them
        self.transport.write(body)
        self.sent = time.perf_counter()
        return self.done

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.times and not self.tail and not data.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(SystemExit(data.decode(errors="replace")))
            return
        data = self.tail + data
        seen = data.count(EVENT)
        self.times += [now] * seen
        if found := USAGE.findall(data):  # one of the last events has it
            self.tokens = int(found[-1])
        if data.endswith(b"\r\n0\r\n\r\n"):
            self.tail = data
            self.done.set_result(None)
        else:  # an event may be cut in two: keep what could be the start of the next
            last = data.rfind(EVENT)
            self.tail = data[max(last + 1, 0) :][-2000:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(SystemExit(f"the server closed the connection: {error}"))


def request(args: argparse.Namespace, host: str, draw: random.Random) -> tuple[bytes, bytes]:
    body = json.dumps(
        {
            "model": args.model,
            "prompt": [draw.randint(10, args.max_token_id) for _ in range(args.input_len)],
            "max_tokens": args.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode(), body


async def load(args: argparse.Namespace) -> dict[str, float]:
    url = urlsplit(args.url)
    assert url.hostname and url.port
    draw = random.Random(args.seed)
    requests = [request(args, url.netloc, draw) for _ in range(args.requests)]
    first: list[float] = []
    gaps: list[float] = []
    tokens = events = 0

    async def worker() -> None:
        nonlocal tokens, events
        _, stream = await asyncio.get_running_loop().create_connection(
            Stream, url.hostname, url.port
        )
        while requests:
            await stream.ask(*requests.pop())
            times = stream.times[:-1]  # the last event brings the usage, and no token
            assert stream.tokens, "an answer without usage"
            tokens += stream.tokens
            events += len(times)
            first.append(times[0] - stream.sent)
            gaps.extend(b - a for a, b in zip(times, times[1:], strict=False))
        stream.transport.close()

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(args.streams)))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    assert tokens == args.requests * args.output_len, tokens
    return {
        "streams": args.streams,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_event": tokens / events,
        "output_tok_s": tokens / seconds,
        "ttft_p50_ms": 1000 * statistics.median(first),
        "ttft_p99_ms": 1000 * percentile(first, 99),
        "itl_p50_ms": 1000 * statistics.median(gaps),
        "itl_p99_ms": 1000 * percentile(gaps, 99),
        "client_cpu_us_per_token": 1e6 * cpu / tokens,
    }


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--requests", type=int, help="default: twice the streams, at least 4")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--max-token-id", type=int, default=15000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.requests = args.requests or max(4, 2 * args.streams)
    print(json.dumps(asyncio.run(load(args))))


if __name__ == "__main__":
    main()
