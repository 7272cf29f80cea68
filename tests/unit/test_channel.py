"""The step path's channels between real processes: nothing lost, mixed or left behind."""

import multiprocessing
import os
import random
import socket
import struct
import threading
import time

import pytest

from workers.channel import ChannelClosed, RingReceiver, RingSender, SocketChannel, open_channel

SIZES = [0, 1, 7, 8, 100, 4000, 4096, 5000, 70_000]  # some larger than the ring


def messages(count: int) -> list[bytes]:
    rng = random.Random(0)
    return [rng.randbytes(rng.choice(SIZES)) for _ in range(count)]


def read_ring(path: str, reader: int, count: int, spin: int, results) -> None:
    ring = RingReceiver(path, reader, spin)
    results.put((reader, [bytes(ring.receive(20)) for _ in range(count)]))


@pytest.mark.parametrize("spin", [0, 1000])
def test_every_reader_of_a_ring_gets_every_message(spin: int) -> None:
    sent = messages(300)
    ring = RingSender(3, 8192)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    readers = [
        context.Process(target=read_ring, args=(ring.path, i, len(sent), spin, results))
        for i in range(3)
    ]
    for reader in readers:
        reader.start()
    for number, message in enumerate(sent):
        ring.send(message)
        if number % 50 == 0:
            time.sleep(0.01)  # let the readers fall asleep
    for _ in readers:
        assert results.get(timeout=30)[1] == sent
    for reader in readers:
        reader.join()
    ring.close()


def test_a_ring_waits_for_its_slowest_reader_and_gives_up_when_closed() -> None:
    ring = RingSender(1, 4096)
    reader = RingReceiver(ring.path)
    assert reader.receive(0) is None
    threading.Timer(0.1, ring.close).start()
    with pytest.raises(ChannelClosed):
        ring.send(b"x" * 10_000)
    with pytest.raises(ChannelClosed):
        ring.send(b"y")
    threading.Timer(0.1, reader.close).start()
    with pytest.raises(ChannelClosed):
        while True:
            reader.receive(10)


def test_a_closed_ring_leaves_no_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    ring = RingSender(1, 4096)
    path = ring.path
    ring.close()
    ring.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(OSError):
        RingReceiver(path)


def test_a_socket_keeps_messages_apart_and_tells_of_the_others_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = open_channel(*listener.getsockname())
        far = SocketChannel(listener.accept()[0])
    sent = messages(100)
    thread = threading.Thread(target=lambda: [near.send(message) for message in sent])
    thread.start()
    assert [bytes(far.receive(10)) for _ in sent] == sent
    thread.join()
    assert far.receive(0) is None
    near.close()
    with pytest.raises(ChannelClosed):
        far.receive(10)
    with pytest.raises(ChannelClosed):
        for _ in range(100):
            far.send(b"x" * 100_000)


def test_a_message_that_is_longer_than_allowed_is_not_waited_for() -> None:
    near, far = socket.socketpair()
    sender, receiver = SocketChannel(near), SocketChannel(far)
    sender.send(b"x" * 100)
    assert receiver.receive(10, most=100) == b"x" * 100
    near.sendall(struct.pack("<Q", 101))  # and nothing of it
    with pytest.raises(ChannelClosed, match="101 bytes, 100 are allowed"):
        receiver.receive(10, most=100)
    sender.close()
    receiver.close()
