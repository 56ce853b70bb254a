"""Servers as `tests.faults.served` that are broken on purpose, for rows that must object to them.

FAULTS_BROKEN=memory python -m tests.faults.broken serve --bundle unused --port 0
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

from serve.coordinator import Coordinator
from serve.engine import Engine
from serve.errors import QueueFullError
from serve.sequence import EventSink, GenerationRequest
from tests.faults import served

BROKEN = "FAULTS_BROKEN"
_LEAKED_BYTES = 512 << 10
_SLOW_S = 0.1


def main() -> None:
    """Break what the environment names, and serve."""
    method, broken = _BUILDS[os.environ[BROKEN]]
    kind, name = method.rsplit(".", 1)
    with patch(f"{kind}.{name}", broken):
        served.main()


def _leaking_memory() -> Callable[..., None]:
    """Every request keeps half a MiB."""
    kept: list[bytearray] = []
    submit = Engine.submit

    def leak(engine: Engine, request: GenerationRequest, sink: EventSink) -> None:
        kept.append(bytearray(os.urandom(1)) * _LEAKED_BYTES)
        submit(engine, request, sink)

    return leak


def _leaking_tasks() -> Callable[..., Any]:
    """Every request leaves a task."""
    answer = Coordinator.answer
    kept: list[asyncio.Task[None]] = []

    async def leak(coordinator: Coordinator, *given: Any, **options: Any) -> Any:
        kept.append(asyncio.create_task(asyncio.sleep(3600)))
        return await answer(coordinator, *given, **options)

    return leak


def _leaking_queue() -> Callable[..., None]:
    """Every refused request keeps its place in the queue."""
    enqueue = Engine._enqueue

    def leak(engine: Engine, count: int, command: Callable[[], None]) -> None:
        try:
            enqueue(engine, count, command)
        except QueueFullError:
            engine._num_admitted += count
            raise

    return leak


def _slow_refusals() -> Callable[..., None]:
    """Every refusal holds up the loop."""
    enqueue = Engine._enqueue

    def refuse(engine: Engine, count: int, command: Callable[[], None]) -> None:
        try:
            enqueue(engine, count, command)
        except QueueFullError:
            time.sleep(_SLOW_S)
            raise

    return refuse


_BUILDS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "memory": ("serve.engine.Engine.submit", _leaking_memory()),
    "tasks": ("serve.coordinator.Coordinator.answer", _leaking_tasks()),
    "queue": ("serve.engine.Engine._enqueue", _leaking_queue()),
    "slow": ("serve.engine.Engine._enqueue", _slow_refusals()),
    "bare": ("serve.statuses._retry_after_s", lambda error: None),
}

if __name__ == "__main__":
    main()
