"""Hosts: how an address is written, and which ones only this machine can reach.

The latter matters for listeners without TLS, and for tokens without it.
"""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine's own; of names only `localhost` is.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example")]
    [True, True, True, False, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def join_port(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 address in brackets.

    >>> join_port("localhost", 80), join_port("::1", 80)
    ('localhost:80', '[::1]:80')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
