"""Servers as `tests.faults.served` that are broken on purpose, for rows that must object to them.

FAULTS_BROKEN=leaks python -m tests.faults.broken serve --bundle unused --port 0
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from serve.engine.engine import Engine
from serve.engine.mail import Inbox
from serve.engine.sequence import EventSink, GenerationRequest
from serve.errors import QueueFullError
from serve.pair.coordinator import Coordinator
from tests.faults import served

BROKEN = "FAULTS_BROKEN"
_LEAKED_BYTES = 2 << 20


def main() -> None:
    """Break what the environment names, and serve."""
    with ExitStack() as stack:
        for name, broken in _BUILDS[os.environ[BROKEN]].items():
            stack.enter_context(patch(name, broken))
        served.main()


def _leaking_memory() -> Callable[..., None]:
    """Every request keeps 2 MiB."""
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
    check_room = Inbox.check_room

    def leak(inbox: Inbox, count: int) -> None:
        try:
            check_room(inbox, count)
        except QueueFullError:
            inbox.num_admitted += count
            raise

    return leak


_BUILDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "leaks": {
        "serve.engine.engine.Engine.submit": _leaking_memory(),
        "serve.pair.coordinator.Coordinator.answer": _leaking_tasks(),
    },
    "refusals": {
        "serve.engine.mail.Inbox.check_room": _leaking_queue(),
        "serve.rpc.statuses._retry_after_s": lambda error: None,
    },
}

if __name__ == "__main__":
    main()
