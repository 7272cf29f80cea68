"""Network addresses as text."""

import socket


def host_port(host: str, port: int) -> str:
    """``host:port`` as URLs have it: the host in brackets if it is an IPv6 address (RFC 3986)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_family(host: str) -> socket.AddressFamily:
    """That of a literal address, or of a name that is taken for one of IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
