"""Ways to a server that can be cut so that nothing arrives any more, and nobody is told.

`Namespace` is the real thing: packets between two network namespaces are dropped. It needs root,
`ip` and `iptables`; where that is not allowed, `Proxy` stops forwarding, with the kernels on both
sides still acknowledging what they get.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from contextlib import AbstractContextManager, ExitStack, suppress
from types import TracebackType

_HOST = "127.0.0.1"


class Namespace(AbstractContextManager["Namespace"]):
    """A network namespace for clients, joined to the server's by a pair of devices.

    Clients are started behind `command`.
    """

    def __init__(self) -> None:
        """Make it; CalledProcessError or OSError where that is not allowed."""
        self.name = f"tandem-{os.getpid()}"
        device, subnet = f"td{os.getpid() % 10**7}", f"10.213.{os.getpid() % 250}"
        self._host = f"{subnet}.1"
        self.command = ("ip", "netns", "exec", self.name)
        self._stack = ExitStack()
        _run("ip", "netns", "add", self.name)
        self._stack.callback(_run, "ip", "netns", "delete", self.name)
        try:
            peer = f"{device}p"
            _run("ip", "link", "add", device, "type", "veth", "peer", "name", peer)
            _run("ip", "link", "set", peer, "netns", self.name)
            _run("ip", "address", "add", f"{self._host}/24", "dev", device)
            _run("ip", "link", "set", device, "up")
            _run("ip", "-n", self.name, "address", "add", f"{subnet}.2/24", "dev", peer)
            _run("ip", "-n", self.name, "link", "set", peer, "up")
            _run(*self.command, "iptables", "--list")
        except BaseException:
            self._stack.close()
            raise

    def open(self, port: int) -> str:
        """Return the target of clients for a port of all addresses."""
        return f"{self._host}:{port}"

    def cut(self) -> None:
        """Lose everything from now on, in both directions."""
        for chain in ("INPUT", "OUTPUT"):
            _run(*self.command, "iptables", "--append", chain, "--jump", "DROP")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


class Proxy(AbstractContextManager["Proxy"]):
    """A TCP proxy on a free port, with two threads a connection."""

    command: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._is_cut = threading.Event()
        self._is_over = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def open(self, port: int) -> str:
        listener = socket.create_server((_HOST, 0))
        self._sockets.append(listener)
        self._start(self._accept, listener, port)
        return f"{_HOST}:{listener.getsockname()[1]}"

    def cut(self) -> None:
        self._is_cut.set()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener: socket.socket, port: int) -> None:
        with suppress(OSError):  # the listener is closed at the end
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((_HOST, port))
                self._sockets += [client, server]
                self._start(self._forward, client, server)
                self._start(self._forward, server, client)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self._is_cut.is_set():
                    self._is_over.wait()
                target.sendall(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()


def open_way() -> Namespace | Proxy:
    """Return the real thing where that is allowed."""
    if os.geteuid() == 0 and shutil.which("ip") and shutil.which("iptables"):
        with suppress(subprocess.CalledProcessError):
            return Namespace()
    return Proxy()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)
