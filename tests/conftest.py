"""What tests of several rooms share: a tiny teacher, one event loop, servers of fake models."""

from __future__ import annotations

import os

# Two lanes of tests share the cores: a thread of OpenMP that waits must not take one from the other
# lane. Read once, when torch loads the library; the servers that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import asyncio
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from serve.text.tokenizer import Tokenizer
from tests.support.backends import TOKENIZER, HistoryBackend, build_tokenizer, fixed_logits
from tests.support.models.tiny_teacher import save_tiny_teacher
from tests.support.pairs import LiveServer, Pair, serve

# A busy machine is no fault of the code: nothing that is timed fails a test.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of 64 hidden units; ends an answer now and then. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("tiny_teacher")
    save_tiny_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One asyncio loop on one thread for all servers: grpc.aio dislikes several."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loop")
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="session")
def serving(loop: asyncio.AbstractEventLoop) -> Callable[..., object]:
    """`with serving(pair) as live`: a real server, drained at the end."""
    return functools.partial(serve, loop)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return TOKENIZER


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Tokenizer]:
    return build_tokenizer


@pytest.fixture(scope="session")
def make_backend() -> type[HistoryBackend]:
    return HistoryBackend


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    return Pair


@pytest.fixture(scope="session")
def continuing_with() -> Callable[[str], torch.Tensor]:
    return fixed_logits


@pytest.fixture(scope="session")
def live(serving: Callable[..., object]) -> Iterator[LiveServer]:
    """A server with both models for tests that leave it as it is."""
    with serving(Pair(), tasks=frozenset({"sums"})) as server:
        yield server
