"""Engines and clients in processes of their own, joined by the transport."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import transport
from cluster.transport import RemoteClient
from engine.errors import EngineError, PromptTooLong, RequestError
from tests.support.simulated_engine import EngineProcess
from tests.support.simulator import VOCAB, foretell
from tests.support.streams import request, submit, tokens_of
from tests.support.waiting import PATIENCE

CLIENT = """
import asyncio, sys
from cluster.transport import RemoteClient
from tests.support.streams import request, submit

async def main():
    client = await RemoteClient.open(sys.argv[1])
    streams = [await submit(client, request(f"theirs-{i}", [i] * 9, 4000)) for i in range(8)]
    print("ready", flush=True)
    await asyncio.gather(*(read(stream) for stream in streams))

async def read(stream):
    async for _ in stream:
        pass

asyncio.run(main())
"""


def state_becomes(engine, wanted, timeout=PATIENCE):
    """Seconds until the engine's state is as wanted."""
    start = time.monotonic()
    while not wanted(state := engine.ask()):
        assert time.monotonic() - start < timeout, state
    return time.monotonic() - start


def empty(state):
    return not (state["unfinished"] or state["device"] or state["cpu"])


def test_streams_of_two_clients_carry_everything():
    rng = random.Random(0)

    async def one(client, name, i):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 300))]
        stream = await submit(client, request(name, prompt, 100, seed=i))
        tokens, reason = await tokens_of(stream)
        assert tokens == foretell(prompt, i, 100) and reason == "length"
        metrics = stream.metrics
        assert metrics.arrival_time <= metrics.first_scheduled_time
        assert metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time

    async def main(address):
        clients = [await RemoteClient.open(address) for _ in range(2)]
        await asyncio.gather(
            *(one(client, f"{c}-{i}", i) for c, client in enumerate(clients) for i in range(40))
        )
        assert clients[0].healthy and clients[0].info.engine_id == "simulated"
        with pytest.raises(PromptTooLong, match="max_model_len 4096"):
            await submit(clients[0], request("long", [1] * 5000))
        stream = await submit(clients[0], request("same", max_tokens=4000))
        with pytest.raises(RequestError, match="running already"):
            await submit(clients[1], request("same"))
        stream.cancel()
        _, reason = await tokens_of(stream)
        assert reason == "abort"
        stream = await submit(clients[0], request("n", n=3, temperature=1.0, max_tokens=500))
        seen = {0: 0, 1: 0, 2: 0}
        async for outcomes in stream:
            for outcome in outcomes:
                seen[outcome.index] += len(outcome.tokens)
                if outcome.index == 2 and 5 <= seen[2] < 100:
                    stream.stop_at_text(2)
        assert seen[0] == seen[1] == 500 and 5 <= seen[2] < 100
        for client in clients:
            await client.close()

    with EngineProcess() as engine:
        asyncio.run(main(engine.address))
        state_becomes(engine, empty)


@pytest.mark.parametrize("kind", ["cancel", "close", "kill"])
def test_a_client_that_goes_leaves_nothing_in_any_state(kind):
    """Eight long requests of which some run, some are swapped out and some wait."""
    with EngineProcess(num_blocks=1100, num_cpu_blocks=3200, max_num_seqs=6) as engine:

        def busy(state):
            return state["cpu"] and state["waiting"] and state["running"]

        if kind == "kill":
            with subprocess.Popen(
                [sys.executable, "-c", CLIENT, engine.address], stdout=subprocess.PIPE
            ) as other:
                other.stdout.readline()
                state_becomes(engine, busy)
                other.kill()
                seconds = state_becomes(engine, empty)
        else:

            async def main():
                client = await RemoteClient.open(engine.address)
                streams = [await submit(client, request(f"{i}", [i], 4000)) for i in range(8)]
                readers = [asyncio.create_task(tokens_of(stream)) for stream in streams]
                await asyncio.to_thread(state_becomes, engine, busy)
                if kind == "cancel":
                    for stream in streams:
                        stream.cancel()
                else:
                    await client.close()
                seconds = await asyncio.to_thread(state_becomes, engine, empty)
                for reader in readers:
                    if kind == "cancel":
                        assert (await reader)[1] == "abort"
                    else:
                        with pytest.raises(EngineError, match="connection was closed"):
                            await reader
                await client.close()
                return seconds

            seconds = asyncio.run(main())
    print(f"freed {seconds * 1e3:.0f} ms after the client's {kind}")


async def fails(client, act, cause):
    """Every stream that is in flight, and the next, raises EngineError with the cause."""
    streams = [await submit(client, request(f"r{i}", max_tokens=4000)) for i in range(4)]
    readers = [asyncio.create_task(tokens_of(stream)) for stream in streams]
    await asyncio.sleep(0.05)
    act()
    start = time.monotonic()
    for reader in readers:
        with pytest.raises(EngineError, match=cause):
            await asyncio.wait_for(reader, PATIENCE)
    assert not client.healthy
    with pytest.raises(EngineError, match=cause):
        await submit(client, request("late"))
    await client.close()
    return time.monotonic() - start


@pytest.mark.parametrize("kind", ["kill", "stop", "hang", "fail"])
def test_an_engine_that_dies_or_hangs_is_named_in_every_stream(kind, monkeypatch):
    monkeypatch.setattr(transport, "SILENCE", 3.0)
    with EngineProcess(step_timeout=1.0) as engine:
        act, cause = {
            "kill": (engine.process.kill, "the engine simulated is gone"),
            "stop": (
                lambda: os.kill(engine.process.pid, signal.SIGSTOP),
                "hangs: .* said nothing for 3",
            ),
            "hang": (lambda: engine.ask("hang"), "hangs: .* no step for [1-4]"),
            "fail": (lambda: engine.ask("fail no more ink"), "OSError: no more ink"),
        }[kind]

        async def main():
            return await fails(await RemoteClient.open(engine.address), act, cause)

        seconds = asyncio.run(main())
    print(f"seen {seconds * 1e3:.0f} ms after the engine's {kind}")


def test_what_an_engine_said_before_it_died_is_read_though_a_write_failed_first():
    """That it had begun a request, of which it died: else that one would end further engines."""

    class Quiet:
        """A sink that notes nothing."""

        def lost(self, attempt, cause):
            pass

        ended = lost

    with EngineProcess(poison=7) as engine:

        async def main():
            client = await RemoteClient.open(engine.address)
            attempt = await client.submit(request("bad", [7], 4), Quiet())
            engine.process.wait()  # this loop reads nothing meanwhile
            later = [client.submit(request(f"{i}", [1], 4), Quiet()) for i in range(3)]
            with pytest.raises(EngineError, match="is gone"):
                await asyncio.gather(*later)
            return attempt.begun

        assert asyncio.run(main())


def test_a_long_step_keeps_nobody_at_the_door_and_breaks_no_connection(monkeypatch):
    """Longer than the time in which a host or a process that says nothing is taken for dead."""
    monkeypatch.setattr(transport, "SILENCE", 3.0)
    with EngineProcess() as engine:

        async def main():
            client = await RemoteClient.open(engine.address)
            stream = await submit(client, request("first", max_tokens=4000))
            engine.ask("step 4.5")
            await asyncio.sleep(0.2)  # such a step is running now
            start = time.monotonic()
            other = await RemoteClient.open(engine.address)
            assert time.monotonic() - start < 4 and other.load.free_blocks
            long = [request(f"{i}", [i] * 4000, 4) for i in range(80)]  # over a MB
            submitted = [asyncio.create_task(submit(client, one)) for one in long]
            await asyncio.sleep(4)
            engine.ask("step 0.001")
            async with asyncio.timeout(PATIENCE):
                streams = await asyncio.gather(*submitted)
            assert client.healthy and other.healthy
            for each in (stream, *streams):
                each.cancel()
            await client.close()
            await other.close()

        asyncio.run(main())
        state_becomes(engine, empty)


def test_strangers_do_no_harm():
    with EngineProcess() as engine:
        host, port, _ = engine.address.split()

        async def main():
            client = await RemoteClient.open(engine.address)
            stream = await submit(client, request("r", max_tokens=300))
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x06\0\0\0sesame", b"\xff" * 8):
                with socket.create_connection((host, int(port))) as stranger:
                    stranger.sendall(garbage)
                    stranger.shutdown(socket.SHUT_WR)
                    assert await asyncio.to_thread(stranger.recv, 100) == b""
            with socket.create_connection((host, int(port))) as stranger:  # knows the key
                stranger.sendall(b"\x06\0\0\0secret\x02\0\0\0\x93\x07")
                while await asyncio.to_thread(stranger.recv, 1 << 16):
                    pass
            tokens, _ = await tokens_of(stream)
            assert len(tokens) == 300
            await client.close()
            with pytest.raises(EngineError, match="no engine answers .* it closed the connection"):
                await RemoteClient.open(f"{host} {port} wrong")

        asyncio.run(main())
        state_becomes(engine, empty)

    async def nobody():
        with pytest.raises(EngineError, match=f"no engine answers at {host}:{port}: .*failed"):
            await RemoteClient.open(engine.address)

    asyncio.run(nobody())


def test_a_stranger_has_a_kilobyte_and_seconds_and_keeps_nobody_out():
    with EngineProcess(key_seconds=1.0) as engine:
        host, port, _ = engine.address.split()

        def stranger():
            return socket.create_connection((host, int(port)))

        async def main():
            for size in (1025, 1 << 28):  # announced; a key of a kilobyte would be waited for
                with stranger() as one:
                    one.sendall(struct.pack("<I", size) + b"x" * 100)
                    assert await asyncio.to_thread(one.recv, 100) == b""
            silent = [stranger() for _ in range(3 * transport.MOST_STRANGERS)]
            for one in silent[::2]:
                one.sendall(b"\x06\0\0\0sec")  # a key that never comes to its end
            client = await RemoteClient.open(engine.address)
            tokens, _ = await tokens_of(await submit(client, request("r", max_tokens=100)))
            assert len(tokens) == 100
            for one in silent:
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.to_thread(one.recv, 100) == b""
                one.close()
            assert client.healthy
            await client.close()

        asyncio.run(main())


def test_where_there_is_no_room_for_connections_the_server_waits_and_lets_in_again():
    with EngineProcess(key_seconds=1.0, most_files=64) as engine:
        host, port, _ = engine.address.split()

        def cpu_seconds():
            fields = Path(f"/proc/{engine.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        many = [socket.create_connection((host, int(port))) for _ in range(100)]
        before = cpu_seconds()
        for one in many:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(100) == b""
            one.close()
        assert cpu_seconds() - before < 0.5  # two or three seconds on the clock

        async def main():
            client = await RemoteClient.open(engine.address)
            tokens, _ = await tokens_of(await submit(client, request("r", max_tokens=10)))
            assert len(tokens) == 10
            await client.close()

        asyncio.run(main())


def test_a_message_in_many_pieces_costs_no_more_than_its_bytes():
    """Joined piece by piece it would be copied a hundred thousand times: 400 GB."""
    reader = transport._Reader(transport.MOST_BYTES)
    body, rest = random.Random(0).randbytes(8 << 20), b"\x02\0\0\0ab\x01\0\0\0c\x03\0"
    data = struct.pack("<I", len(body)) + body + rest
    pieces = [data[i : i + 64] for i in range(0, len(data), 64)]
    found = [bytes(message) for piece in pieces for message in reader.take(piece)]
    assert found == [body, b"ab", b"c"]
    assert [bytes(message) for message in reader.take(b"\0\0xyz")] == [b"xyz"]


def test_a_client_that_is_slow_to_read_keeps_its_connection(monkeypatch):
    """Its window is shut for longer than a host may say nothing; then it goes on."""
    monkeypatch.setattr(transport, "SILENCE", 100.0)  # it hears nothing while it does not read
    with EngineProcess() as engine:

        async def main():
            client = await RemoteClient.open(engine.address)
            prompts = [[i] * 9 for i in range(40)]
            streams = [
                await submit(client, request(f"{i}", prompt, 1500, seed=i))
                for i, prompt in enumerate(prompts)
            ]
            client._transport.pause_reading()
            await asyncio.to_thread(state_becomes, engine, empty)
            await asyncio.sleep(transport.HOST_TIMEOUT + 3)
            client._transport.resume_reading()
            for i, stream in enumerate(streams):
                tokens, reason = await tokens_of(stream)
                assert tokens == foretell(prompts[i], i, 1500) and reason == "length"
            assert client.healthy
            await client.close()

        asyncio.run(main())


def test_a_client_that_reads_nothing_holds_nobody_up_and_is_let_go():
    with EngineProcess(most_unread=1000) as engine:

        async def main():
            client = await RemoteClient.open(engine.address)
            slow = await RemoteClient.open(engine.address)
            slow._transport.pause_reading()
            sampling = {"n": 50, "temperature": 1.0}
            tasks = [  # more than a minute's work, if they were not ended
                asyncio.create_task(submit(slow, request(f"slow{i}", max_tokens=4000, **sampling)))
                for i in range(6)
            ]
            await asyncio.to_thread(state_becomes, engine, lambda state: state["running"] > 10)
            stream = await submit(client, request("r", max_tokens=300))
            tokens, _ = await tokens_of(stream)
            assert len(tokens) == 300
            await asyncio.to_thread(state_becomes, engine, empty)
            assert client.healthy
            await client.close()
            await slow.close()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(main())
