"""The benchmark's HTTP client, against servers that answer in every way there is."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from deploy.http_stream import Answer, BrokenStream, HttpClient

T = TypeVar("T")
EVENTS = [
    b'data: {"a": "one"}\n\n', b": a comment\n\n",
    b'data: {"b": "\\n\\n"}\n\n', b"data: [DONE]\n\n",
]  # fmt: skip
DATA = [b'{"a": "one"}', b'{"b": "\\n\\n"}', b"[DONE]"]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = STREAM + b"Transfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def run(
    pieces: list[bytes], requests: int = 1, close: bool = False
) -> tuple[list[tuple[Answer, list[bytes]]], int]:
    """Answers to requests for which a server writes ``pieces`` one by one; and connections used."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await read_request(reader):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                break
        writer.close()

    async def ask(client: HttpClient) -> list[tuple[Answer, list[bytes]]]:
        found = []
        for _ in range(requests):
            events: list[bytes] = []
            answer = await client.request(
                "POST", "/x", b"{}", lambda data, at, events=events: events.append(data)
            )
            found.append((answer, events))
            await asyncio.sleep(0.01)  # a close by the server is seen
        return found

    return asyncio.run(with_server(serve, ask)), connections


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """A request's body, or nothing at the end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)


async def with_server(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    ask: Callable[[HttpClient], Awaitable[T]],
) -> T:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base")
        found = await ask(client)
        client.close()
    return found


def test_chunks_cut_anywhere() -> None:
    whole = CHUNKED + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"
    odd = CHUNKED + chunk(b"".join(EVENTS)[:7]) + chunk(b"".join(EVENTS)[7:]) + b"0\r\n\r\n"
    for pieces in ([whole], [odd], [whole[i : i + 1] for i in range(len(whole))]):
        found, connections = run(pieces, requests=2)
        assert connections == 1
        for answer, events in found:
            assert (answer.status, answer.body, events) == (200, b"", DATA)


def test_bodies_of_known_length_and_until_the_end() -> None:
    body = b'{"error": {"message": "no"}}'
    known = b"HTTP/1.1 429 Too Many\r\nRetry-After: 1\r\nContent-Length: 28\r\n\r\n" + body
    found, connections = run([known[:50], known[50:]], requests=3)
    assert connections == 1
    for answer, events in found:
        assert (answer.status, answer.body, events) == (429, body, [])
        assert answer.headers["retry-after"] == "1"
    found, connections = run([STREAM + b"\r\n", *EVENTS], requests=2, close=True)
    assert connections == 2
    assert [events for _, events in found] == [DATA, DATA]
    nothing = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    assert run([nothing])[0][0][0].body == b""


def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    whole = CHUNKED + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"
    found, connections = run([whole], requests=3, close=True)
    assert connections == 3
    assert all(events == DATA for _, events in found)


def test_an_answer_that_breaks_off_is_an_error() -> None:
    for pieces in (
        [CHUNKED, chunk(EVENTS[0])],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab"],
    ):
        with pytest.raises(BrokenStream, match="closed the connection"):
            run(pieces, close=True)


def test_a_cancelled_request_closes_its_connection() -> None:
    async def scenario() -> None:
        gone = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(CHUNKED + chunk(EVENTS[0]))
            await reader.read()
            gone.set()
            writer.close()

        async def ask(client: HttpClient) -> None:
            seen = asyncio.Event()
            task = asyncio.create_task(
                client.request("POST", "/x", b"{}", lambda data, at: seen.set())
            )
            await seen.wait()
            task.cancel()
            await asyncio.wait_for(gone.wait(), 10)
            with pytest.raises(asyncio.CancelledError):
                await task

        await with_server(serve, ask)

    asyncio.run(scenario())


def test_no_server_and_no_url() -> None:
    with pytest.raises(OSError):
        asyncio.run(HttpClient("http://127.0.0.1:9").request("GET", "/"))
    for url in ("127.0.0.1:8000", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="a URL like"):
            HttpClient(url)
