"""Network addresses as text."""


def host_port(host: str, port: int) -> str:
    """``host:port`` as URLs have it: the host in brackets if it is an IPv6 address (RFC 3986)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
