"""Whether a server will be able to listen where it is told to: asked before models are loaded."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bundle.errors import UserError
from serve.addresses import ABSTRACT, UNIX, is_unix
from serve.app.config import ServeConfig

# Of a socket's file: its owner and its group may connect.
_SOCKET_UMASK = 0o117


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
            if is_unix(host):
                _try_unix(flag.replace("port", "host"), host)
            else:
                held.enter_context(_bind(flag, host, port))


def _bind(flag: str, host: str, port: int) -> socket.socket:
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise UserError(f"--{flag.replace('port', 'host')} {host}: {error.strerror}") from None
    try:
        listener = socket.socket(family, kind, protocol)
    except OSError as error:  # a machine without IPv6
        raise _cannot_listen(flag, port, host, error) from None
    # As servers do: a port whose last connections are still fading is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise _cannot_listen(flag, port, host, error) from None
    return listener


def _cannot_listen(flag: str, port: int, host: str, error: OSError) -> UserError:
    hint = "; give another port, or 0 for a free one" if error.errno == errno.EADDRINUSE else ""
    return UserError(f"--{flag} {port}: cannot listen on {host}: {error.strerror}{hint}")


def _try_unix(flag: str, address: str) -> None:
    """Bind a Unix socket, and let go of it again; UserError."""
    try:
        remove_stale_socket(address)
        with socket.socket(socket.AF_UNIX) as listener:
            if address.startswith(ABSTRACT):
                listener.bind("\0" + address.removeprefix(ABSTRACT))
            else:
                listener.bind(address.removeprefix(UNIX))
                Path(address.removeprefix(UNIX)).unlink()
    except OSError as error:
        raise UserError(f"--{flag} {address}: cannot listen: {error.strerror}") from None


def remove_stale_socket(address: str) -> None:
    """Remove the file that a server has left that was killed; gRPC would also take a live one.

    Raises:
        UserError: somebody listens there, or something else has that path.
        OSError: it cannot be looked at, or not be removed.
    """
    path = Path(address.removeprefix(UNIX))
    if address.startswith(ABSTRACT):
        return
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UserError(f"{path} is there, and no socket; remove it, or listen elsewhere")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # it listens, and has no time for us
            pass
    raise UserError(f"{path} is in use: another server listens there")


@contextmanager
def socket_permissions() -> Iterator[None]:
    """Give the files of sockets that are made within the mode 0660."""
    before = os.umask(_SOCKET_UMASK)
    try:
        yield
    finally:
        os.umask(before)
