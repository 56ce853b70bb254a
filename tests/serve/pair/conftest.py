"""Remote teachers for the tests of the pair."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.rpc.remote_teachers import RemoteTeachers, lying_server


@pytest.fixture
def remote(serving: Any, make_pair: Any, tokenizer: Any) -> Iterator[RemoteTeachers]:
    with ExitStack() as stack:
        yield RemoteTeachers(serving, make_pair, tokenizer, stack)


@pytest.fixture
def liar(loop: asyncio.AbstractEventLoop, tokenizer: Any) -> Iterator[str]:
    with lying_server(loop, tokenizer.hash) as address:
        yield address
