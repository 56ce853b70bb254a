"""Whether a server will be able to listen where it is told to: asked before models are loaded."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from bundle.errors import UserError
from serve.config import ServeConfig


def check_listeners(config: ServeConfig) -> None:
    """Raise UserError, which names the flag, when an address cannot be listened on.

    All ports are held at the same time, so that two listeners cannot be given one. A port may still
    be lost to somebody else between this and the listening itself.
    """
    places = {
        "port": (config.host, config.port),
        "control-port": (config.control_host, config.control_port),
        "metrics-port": (config.metrics_host, config.metrics_port),
    }
    with ExitStack() as held:
        for flag, (host, port) in places.items():
            held.enter_context(_bind(flag, host, port))


def _bind(flag: str, host: str, port: int) -> socket.socket:
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise UserError(f"--{flag.replace('port', 'host')} {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    # As servers do: a port whose last connections are still fading is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"--{flag} {port}: cannot listen on {host}: {error.strerror}") from None
    return listener
