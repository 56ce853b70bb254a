"""Servers behind a gate, for tests of the gate."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.rpc.credentials.tokens import TokenFile
from tests.support.rpc.gated import serve_gated


@pytest.fixture
def gated(loop: asyncio.AbstractEventLoop) -> Any:
    """`with gated(max_concurrent=2, tokens=...) as it`."""
    return functools.partial(serve_gated, loop)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    """The clients ada, with all scopes, and bob, who may not administer; their names are tokens."""
    path = tmp_path / "tokens"
    scopes = {"ada": "inference,control", "bob": "inference"}
    path.write_text(
        "".join(f"{n} {hashlib.sha256(n.encode()).hexdigest()} {s}\n" for n, s in scopes.items())
    )
    return TokenFile(path)


@pytest.fixture
def unsent() -> Iterator[Callable[[], Iterator[bytes]]]:
    """Requests that do not come while the test runs."""
    is_over = threading.Event()

    def wait() -> Iterator[bytes]:
        is_over.wait(60)
        yield from ()

    yield wait
    is_over.set()
