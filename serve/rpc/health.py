"""`grpc.health.v1.Health`, where no client can hold up another one or the server.

`grpc_health`'s own servicer cannot be used: a watcher that leaves takes the others' news with it,
and one that reads nothing blocks whoever sets a status.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from serve.rpc.statuses import STOPPED_RETRY_AFTER_S, Status, abort

NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
MAX_NAME_BYTES = 256
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

Context = grpc.aio.ServicerContext[Any, Any]

_NO_SUCH_NAME = Status(grpc.StatusCode.NOT_FOUND, "no such health name")
_LONG_NAME = Status(
    grpc.StatusCode.INVALID_ARGUMENT, f"a health name has at most {MAX_NAME_BYTES} bytes"
)
_ENDING = Status(
    grpc.StatusCode.UNAVAILABLE, "the server ends", retry_after_s=STOPPED_RETRY_AFTER_S
)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # later ones have a List
    """Answers probes and watchers from memory; lives on one asyncio loop.

    A watcher is told the newest status, not every one, and no faster than it reads. At most
    `max_watchers` watch at a time.
    """

    def __init__(self, max_watchers: int = 1000) -> None:
        self._max_watchers = max_watchers
        self._statuses: dict[str, int] = {}
        self._watchers: set[asyncio.Event] = set()  # set when there may be news
        self._is_closed = False

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def set(self, name: str, is_serving: bool) -> None:
        """Change a status, and wait for nobody; without effect after `close`."""
        if not self._is_closed:
            self._statuses[name] = _SERVING if is_serving else _NOT_SERVING
            self._wake_watchers()

    def close(self) -> None:
        """Serve no name any more: watchers are told so, and then their calls end."""
        self._statuses = dict.fromkeys(self._statuses, _NOT_SERVING)
        self._is_closed = True
        self._wake_watchers()

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Return the status of a name; NOT_FOUND when there is none."""
        status = self._statuses.get(request.service)
        if status is None:
            await abort(context, _NO_SUCH_NAME)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        """Tell a status and its changes; of an unknown name SERVICE_UNKNOWN until it is known."""
        if len(request.service.encode()) > MAX_NAME_BYTES:
            await abort(context, _LONG_NAME)
        if len(self._watchers) >= self._max_watchers:
            await abort(context, self._too_many())
        has_news = asyncio.Event()
        self._watchers.add(has_news)
        try:
            await self._tell(request.service, has_news, context)
        finally:
            self._watchers.remove(has_news)
        await abort(context, _ENDING)

    async def _tell(self, name: str, has_news: asyncio.Event, context: Context) -> None:
        """Write the status whenever it is not what was written last, until `close`."""
        shown = None
        while (status := self._statuses.get(name, _UNKNOWN)) != shown or not self._is_closed:
            if status != shown:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                shown = status
            else:
                has_news.clear()
                await has_news.wait()

    def _wake_watchers(self) -> None:
        for has_news in self._watchers:
            has_news.set()

    def _too_many(self) -> Status:
        return Status(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{self._max_watchers} watch the health of this server, which is the limit",
        )
