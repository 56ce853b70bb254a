"""The process of `tandem serve`: its signals, its exit code and its ready file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bundle.errors import UserError
from protos.tandem.v1 import inference_pb2 as pb
from serve.app.config import ServeConfig
from serve.app.process import serve
from serve.client import Client, ControlClient

SERVE_UNTIL_SIGNAL = """
import asyncio, sys
sys.path.insert(0, {root!r})
from tests.support.pairs import Pair
from serve.app.config import ServeConfig
from serve.app.process import serve_until_signal

async def main():
    pair = Pair(max_model_len=100_000)
    config = ServeConfig(bundle="x", port=0, control_port=0, metrics_port=0, **{settings!r})
    await serve_until_signal(pair.engines, config, pair.metrics)

asyncio.run(main())
"""
FULL_COLLECTION = """
import gc
unlooked_at = gc.get_freeze_count()
assert unlooked_at > 10 * len(gc.get_objects()), (unlooked_at, len(gc.get_objects()))
"""


class Process:
    """A server in a process of its own, that is ready."""

    def __init__(self, process: subprocess.Popen[bytes], ready: Path) -> None:
        self.process = process
        self.ready = ready
        self.wait_until(ready.exists)
        self.addresses: dict[str, str] = json.loads(ready.read_text())

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            assert self.process.poll() is None, "the server ended early"
            time.sleep(0.01)


@contextmanager
def serving_process(ready: Path, *, then: str = "", **settings: float) -> Iterator[Process]:
    """Have a server run; `then` is what its process does last."""
    script = SERVE_UNTIL_SIGNAL.format(
        root=str(Path(__file__).parents[3]),
        settings={"ready_file": str(ready), **settings},
    )
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", script + then])
    try:
        yield Process(process, ready)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", ["SIGTERM", "Drain"])
def test_server_drains_and_ends_with_exit_0(tmp_path: Path, how: str) -> None:
    with serving_process(tmp_path / "ready.json", drain_delay_s=0.2) as server:
        assert server.addresses["metrics_url"].startswith("http://127.0.0.1:")
        with Client(server.addresses["address"], timeout_s=30) as client:
            assert len(client.get_models().models) == 2
        if how == "Drain":
            with ControlClient(server.addresses["control_address"], timeout_s=30) as control:
                control.drain()
        else:
            server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: not server.ready.exists())  # while it still serves
        assert server.process.wait(30) == 0
    assert not list(tmp_path.iterdir())


def test_collector_does_not_look_at_what_was_loaded(tmp_path: Path) -> None:
    with serving_process(tmp_path / "ready.json", then=FULL_COLLECTION) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_second_signal_ends_what_still_runs(tmp_path: Path) -> None:
    sampling = pb.SamplingParams(max_tokens=90_000, ignore_eos=True)
    settings = {"drain_delay_s": 60, "drain_grace_s": 60}
    with (
        serving_process(tmp_path / "ready.json", **settings) as server,
        Client(server.addresses["address"], timeout_s=60) as client,
    ):
        stream = client.generate(pb.GenerateRequest(prompt="x", sampling=sampling))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: not server.ready.exists())
        server.process.send_signal(signal.SIGINT)
        events = list(stream)
        assert server.process.wait(10) == 0
    sample = next(e.complete.sample for e in events if e.HasField("complete"))
    assert sample.finish_reason == pb.FINISH_REASON_SHUTDOWN


def test_ready_file_of_an_earlier_process_is_gone_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    ready = tmp_path / "ready.json"
    ready.write_text('{"address": "127.0.0.1:1"}')
    with pytest.raises(UserError, match="bundle"):
        serve(ServeConfig(bundle=tmp_path / "no-bundle", ready_file=ready))
    assert not ready.exists()


def test_ready_file_that_cannot_be_removed_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^--ready-file {tmp_path}: "):
        serve(ServeConfig(bundle="x", ready_file=tmp_path))
