"""Ports for listeners that start later than they are chosen."""

import socket

import pytest

from deploy import ports


def test_a_port_in_use_or_spoken_for_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    used, spoken_for, *free = range(23456, 23461)
    monkeypatch.setattr(ports, "CHOICE", range(23456, 23461))
    with socket.create_server(("", used)):
        assert sorted(ports.free_ports(3, besides=spoken_for)) == free
        with pytest.raises(OSError, match="no 4 free ports from 23456 to 23460"):
            ports.free_ports(4, besides=spoken_for)
