"""The launchers of a run on several machines, each of which knows when another one is lost.

Each holds a TCP connection to that of machine 0, which answers once all are there. A process that
dies closes its connection; a machine that vanishes without a word is noticed by TCP keepalive,
`MAX_SILENCE_S` after its last sign of life.

It trusts its network, as torch.distributed does: let nobody else reach these ports.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

INTERRUPTED = 5  # as `tandem export` has it: what is finished is kept
MAX_SILENCE_S = 30

_KEEPALIVE_S = 5
_RETRY_S = 0.1
_HELLO_TIMEOUT_S = 5.0
_MIN_TIMEOUT_S = 0.001  # 0 would not wait but fail
# A process that lost its peer exits with 1 as well, before or after its launcher hears of it.
LOSS_IS_KNOWN_WITHIN_S = 5.0
_RANK_BYTES = 2
_START, _DONE = b"s", b"d"
_NEWS_DONE = "machine 0 is done"


class MachinesMissingError(Exception):
    """Not all machines came within `MAX_WAIT_S`."""


@dataclass(frozen=True, slots=True)
class Node:
    """One of `num_machines`; `port` is where machine 0, at `main_host`, listens to the others."""

    rank: int
    num_machines: int
    main_host: str
    port: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class Peers:
    """The connections to the other launchers. A context manager: it closes them.

    `on_loss` is called once, from a thread, with what became of the first machine that was lost.
    """

    def __init__(
        self,
        links: Mapping[int, socket.socket],
        listener: socket.socket | None,
        on_loss: Callable[[str], None],
        loss_is_known_within_s: float,
    ) -> None:
        self._links = links
        self._listener = listener
        self._on_loss = on_loss
        self._loss_is_known_within_s = loss_is_known_within_s
        self._lock = threading.Lock()
        self._is_over = False
        self._lost, self._done = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @classmethod
    def meet(
        cls,
        machine: Node,
        on_loss: Callable[[str], None],
        timeout_s: float,
        loss_is_known_within_s: float = LOSS_IS_KNOWN_WITHIN_S,
    ) -> Peers:
        """Wait until every machine is there; MachinesMissingError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        if not machine.is_main:
            return cls({0: _join(machine, deadline_s)}, None, on_loss, loss_is_known_within_s)
        listener = _listen(machine.port)
        links = _gather(listener, machine, deadline_s)
        return cls(links, listener, on_loss, loss_is_known_within_s)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._is_over = True
        for link in self._links.values():
            with suppress(OSError):  # gone already
                link.shutdown(socket.SHUT_RDWR)  # wakes the watcher
        self._watcher.join()
        for each in (*self._links.values(), *([self._listener] if self._listener else [])):
            each.close()

    def agree(self, exit_code: int) -> int:
        """Return what to exit with, given how this machine's processes ended.

        Success is machine 0's to give: were another one to end and machine 0 then lost, nobody
        would be there to help it when it starts again.
        """
        if exit_code == 0:
            return self._dismiss() if self._listener else self._wait_for_dismissal()
        if exit_code == 1 and self._lost.wait(self._loss_is_known_within_s):
            return INTERRUPTED
        return exit_code

    def _dismiss(self) -> int:
        with self._lock:
            self._is_over = True
        for link in self._links.values():
            with suppress(OSError):  # gone already: there was nothing left for it to do
                link.sendall(_DONE)
        return 0

    def _wait_for_dismissal(self) -> int:
        while not (self._done.is_set() or self._lost.is_set()):
            self._done.wait(_RETRY_S)
        return 0 if self._done.is_set() else INTERRUPTED

    def _watch(self) -> None:
        watched = [*self._links.values(), *([self._listener] if self._listener else [])]
        news = None
        while news is None:
            ready = select.select(watched, [], [])[0]
            news = next(filter(None, map(self._read, ready)), None)
        with self._lock:
            if self._is_over:
                return
            if news == _NEWS_DONE:
                self._done.set()
                return
            self._lost.set()
            self._on_loss(news)

    def _read(self, ready: socket.socket) -> str | None:
        """Return what a readable socket tells; None when a stranger connected."""
        if ready is self._listener:
            with ready.accept()[0] as link:
                rank = _read_rank(link)
            # Its old connection may look alive for a while.
            return None if rank is None else f"machine {rank} was started again"
        rank = next(rank for rank, link in self._links.items() if link is ready)
        try:
            return _NEWS_DONE if ready.recv(1) == _DONE else f"machine {rank} is gone"
        except OSError as error:
            return f"machine {rank} is gone ({error.strerror})"


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _gather(listener: socket.socket, machine: Node, deadline_s: float) -> dict[int, socket.socket]:
    """Return the links to all other machines by rank, once they are all there."""
    links: dict[int, socket.socket] = {}
    while len(links) < machine.num_machines - 1:
        listener.settimeout(max(_MIN_TIMEOUT_S, deadline_s - time.monotonic()))
        try:
            link = listener.accept()[0]
        except TimeoutError:
            for link in (listener, *links.values()):
                link.close()
            missing = sorted(set(range(1, machine.num_machines)) - set(links))
            raise MachinesMissingError(f"waited in vain for the machines {missing}") from None
        rank = _read_rank(link)
        if rank is None:
            link.close()
            continue
        if rank in links:  # it was started again meanwhile
            links.pop(rank).close()
        _keep_alive(link)
        links[rank] = link
    listener.settimeout(None)
    for link in links.values():
        with suppress(OSError):  # gone again: the watcher sees it
            link.sendall(_START)
    return links


def _join(machine: Node, deadline_s: float) -> socket.socket:
    """Return the link to machine 0, once all are there; its name may not resolve at first."""
    while time.monotonic() < deadline_s:
        with suppress(OSError):
            link = socket.create_connection((machine.main_host, machine.port), _HELLO_TIMEOUT_S)
            if _is_started(link, machine.rank, deadline_s):
                return link
            link.close()
        time.sleep(_RETRY_S)
    address = f"{machine.main_host}:{machine.port}"
    raise MachinesMissingError(f"waited in vain for machine 0 at {address}")


def _is_started(link: socket.socket, rank: int, deadline_s: float) -> bool:
    """Introduce this machine to machine 0, and wait for the word to start."""
    _keep_alive(link)
    link.settimeout(max(_MIN_TIMEOUT_S, deadline_s - time.monotonic()))
    try:
        link.sendall(rank.to_bytes(_RANK_BYTES, "big"))
        said = link.recv(1)
    except OSError:
        return False
    link.settimeout(None)
    return said == _START


def _read_rank(link: socket.socket) -> int | None:
    """Return the rank that a machine says; None when whoever connected is none of ours."""
    link.settimeout(_HELLO_TIMEOUT_S)
    try:
        said = link.recv(_RANK_BYTES)
    except OSError:
        return None
    link.settimeout(None)
    return int.from_bytes(said, "big") if len(said) == _RANK_BYTES else None


def _keep_alive(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, MAX_SILENCE_S // _KEEPALIVE_S - 1)
