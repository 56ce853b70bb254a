"""What cannot be listened on is told by its flag, before anything is loaded."""

from __future__ import annotations

import socket

import pytest

from bundle.errors import UserError
from serve.app.config import ServeConfig
from serve.app.listeners import check_listeners

FREE = {"bundle": "x", "port": 0, "control_port": 0, "metrics_port": 0}


def check(**settings: object) -> None:
    check_listeners(ServeConfig(**(FREE | settings)))


@pytest.mark.parametrize("name", ["port", "control_port", "metrics_port"])
def test_taken_port_is_named(name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"--{name.replace('_', '-')} {number}: cannot listen.*free one"
        ):
            check(**{name: number})
    check(**{name: number})


def test_one_port_for_two_listeners_is_refused() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    with pytest.raises(UserError, match=f"--control-port {number}: cannot listen"):
        check(port=number, control_port=number)


@pytest.mark.parametrize("name", ["host", "control_host", "metrics_host"])
def test_host_that_is_not_this_machines_is_named(name: str) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(UserError, match=f"--{flag} no-such-host.invalid"):
        check(**{name: "no-such-host.invalid", "insecure_listen": True})
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1"):
        check(**{name: "192.0.2.1", "insecure_listen": True})
