"""Launchers that watch each other, over real sockets: threads stand for machines."""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from export.run.peers import INTERRUPTED, MAX_SILENCE_S, MachinesMissingError, Node, Peers
from tests.support.processes import free_port

WAIT_S = 10.0
Losses = queue.SimpleQueue[str]
Meet = Callable[[int], list[tuple[Peers, Losses]]]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def meet(port: int, stack: ExitStack) -> Meet:
    """`meet(3)` gives the peers of three machines that met, and what each says is lost."""

    def meet(num_machines: int) -> list[tuple[Peers, Losses]]:
        losses = [Losses() for _ in range(num_machines)]

        def join(rank: int) -> Peers:
            machine = Node(rank, num_machines, "127.0.0.1", port)
            return Peers.meet(machine, losses[rank].put, WAIT_S, loss_is_known_within_s=0.2)

        with ThreadPoolExecutor() as pool:
            # Node 0 comes last: the others have to wait for it.
            joined = [pool.submit(join, rank) for rank in reversed(range(num_machines))]
        met = [stack.enter_context(future.result()) for future in reversed(joined)]
        return list(zip(met, losses, strict=True))

    return meet


def leave(peer: Peers) -> None:
    peer.__exit__()


@pytest.fixture
def port() -> int:
    return free_port()


def test_agree_on_success_is_for_machine_0_to_give(meet: Meet) -> None:
    (main, _), *others = meet(3)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(other.agree, 0) for other, _ in others]
        with pytest.raises(TimeoutError):
            waiting[0].result(timeout=0.1)
        assert main.agree(0) == 0
        leave(main)
        assert [each.result(WAIT_S) for each in waiting] == [0, 0]
    assert all(losses.empty() for _, losses in others)


def test_agree_on_success_of_machine_0_needs_nobody_any_more(
    meet: Meet,
) -> None:
    (main, losses), (other, _) = meet(2)
    leave(other)
    losses.get(timeout=WAIT_S)
    assert main.agree(0) == 0


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_lost_machine_is_heard_of_by_every_other(lost: int, meet: Meet) -> None:
    """Node 1 hears of a lost machine 2 by machine 0, which ends because of it."""
    machines = meet(3)
    leave(machines[lost][0])
    first = 0 if lost else 1
    assert machines[first][1].get(timeout=WAIT_S) == f"machine {lost} is gone"
    assert machines[first][0].agree(1) == INTERRUPTED
    leave(machines[first][0])
    (last,) = {0, 1, 2} - {lost, first}
    assert machines[last][1].get(timeout=WAIT_S) == "machine 0 is gone"
    assert machines[last][0].agree(1) == INTERRUPTED


def test_agree_on_success_without_machine_0_is_to_start_again(
    meet: Meet,
) -> None:
    (main, _), (other, _) = meet(2)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(other.agree, 0)
        leave(main)
        assert waiting.result(WAIT_S) == INTERRUPTED


@pytest.mark.parametrize(
    ("exit_code", "is_lost"),
    [*((code, False) for code in (1, 2, 3, 4, 5, 137)), *((code, True) for code in (2, 3, 4, 137))],
)
def test_agree_keeps_an_exit_code_that_says_more_than_a_loss(
    meet: Meet, exit_code: int, is_lost: bool
) -> None:
    (main, losses), (other, _) = meet(2)
    if is_lost:
        leave(other)
        losses.get(timeout=WAIT_S)
    assert main.agree(exit_code) == exit_code
    assert losses.empty()


def test_machine_that_comes_again_was_lost_and_a_stranger_was_not(port: int, meet: Meet) -> None:
    """Its node vanished, so that the old connection still looks alive."""
    (_, losses), _ = meet(2)
    socket.create_connection(("127.0.0.1", port)).close()
    with socket.create_connection(("127.0.0.1", port)) as again:
        again.sendall((1).to_bytes(2, "big"))
        # Served after the stranger, who was no loss.
        assert losses.get(timeout=WAIT_S) == "machine 1 was started again"


def test_machine_that_starts_again_while_others_are_waited_for_is_welcome(
    port: int, stack: ExitStack
) -> None:
    main = Node(0, 3, "127.0.0.1", port)
    losses = Losses()
    with ThreadPoolExecutor() as pool:
        meeting = pool.submit(Peers.meet, main, losses.put, WAIT_S)
        links = []
        for rank in (1, 1, 2):
            link = stack.enter_context(connect(port))
            link.sendall(rank.to_bytes(2, "big"))
            links.append(link)
        stack.enter_context(meeting.result(WAIT_S))
    assert [link.recv(1) for link in links] == [b"", b"s", b"s"]
    assert losses.empty()


def test_stranger_is_none_of_those_who_are_waited_for(port: int) -> None:
    with ThreadPoolExecutor() as pool, pytest.raises(MachinesMissingError, match=r"\[1\]"):
        meeting = pool.submit(Peers.meet, Node(0, 2, "127.0.0.1", port), print, 0.5)
        connect(port).close()
        meeting.result(WAIT_S)


def connect(port: int) -> socket.socket:
    for _ in range(1000):
        try:
            return socket.create_connection(("127.0.0.1", port), WAIT_S)
        except ConnectionRefusedError:
            continue
    raise AssertionError("nobody listens")


def test_machine_0_names_those_that_did_not_come(port: int) -> None:
    with pytest.raises(MachinesMissingError, match=r"in vain for the machines \[1, 2\]"):
        Peers.meet(Node(0, 3, "127.0.0.1", port), print, 0.1)


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_others_name_machine_0_when_it_did_not_come(host: str, port: int) -> None:
    with pytest.raises(MachinesMissingError, match=f"in vain for machine 0 at {host}:{port}"):
        Peers.meet(Node(1, 2, host, port), print, 0.1)


def test_others_wait_no_longer_for_a_machine_0_that_lacks_somebody(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(MachinesMissingError):
        Peers.meet(Node(1, 2, "127.0.0.1", port), print, 0.1)


def test_silence_is_noticed_by_the_kernel(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `MAX_SILENCE_S`: the first probe's wait and that for each probe's answer."""
    links: list[socket.socket] = []
    connect, accept = socket.create_connection, socket.socket.accept

    def joined(*arguments: Any) -> socket.socket:
        links.append(connect(*arguments))
        return links[-1]

    def gathered(listener: socket.socket) -> tuple[socket.socket, Any]:
        link, address = accept(listener)
        links.append(link)
        return link, address

    monkeypatch.setattr(socket, "create_connection", joined)
    monkeypatch.setattr(socket.socket, "accept", gathered)
    meet(2)
    assert len(links) == 2, "one at either end"
    for link in links:
        options = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
        idle_s, interval_s, count = (link.getsockopt(socket.IPPROTO_TCP, each) for each in options)
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert idle_s + interval_s * count == MAX_SILENCE_S
