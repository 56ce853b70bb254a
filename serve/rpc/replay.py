"""The idempotency cache: one run per request id, any number of readers, kept answers.

While a run goes on, a repeated request follows it from its first response. A run that succeeded,
with nothing in its answer cut short or failed, is kept for some time. A run without readers is
cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from google.protobuf.message import Message

from serve.errors import DeadlineError, InvalidFieldError

logger = logging.getLogger(__name__)

Emit = Callable[[Any], None]
Run = Callable[[Emit], Awaitable[bool]]
"""Emits responses in order; returns whether a repeated request is to get the same ones."""
Admit = Callable[[], None]
"""Raises where a run would only be refused: before anything is made for it."""


def admit_all() -> None:
    """Leave it to the run."""


@dataclass(frozen=True, slots=True)
class RunKey:
    """Names a run: ids belong to tenants, and an id to one request of its tenant."""

    tenant: str
    request_id: str


@dataclass(slots=True, eq=False)
class _Reader:
    """Who reads a recording: the next response that it wants, and whether there is a new one."""

    position: int = 0
    is_new: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class _Recording:
    """The responses of one run, and who waits for the next one.

    Of one that is not kept a response is forgotten once all readers have read it.
    """

    digest: bytes
    is_kept: bool
    responses: list[Message | bytes | None] = field(default_factory=list)
    response_type: type[Message] = Message
    task: asyncio.Task[None] | None = None
    is_over: bool = False
    error: BaseException | None = None
    readers: list[_Reader] = field(default_factory=list)
    num_forgotten: int = 0
    size_bytes: int = 0
    expires_s: float = 0.0

    def emit(self, response: Message) -> None:
        self.response_type = type(response)
        self.responses.append(response)
        self.wake()

    def take(self, reader: _Reader) -> Any:
        """Return the reader's next response."""
        response = self.responses[reader.position]
        reader.position += 1
        if not self.is_kept:
            self.forget()
        if isinstance(response, bytes):
            return self.response_type.FromString(response)
        return response

    def forget(self) -> None:
        """Let go of the responses that every reader has read."""
        num_read = min((reader.position for reader in self.readers), default=0)
        for position in range(self.num_forgotten, num_read):
            self.responses[position] = None
        self.num_forgotten = max(self.num_forgotten, num_read)

    def pack(self) -> None:
        """Serialize the responses, since messages in memory take several times their size."""
        self.responses = [
            r.SerializeToString() if isinstance(r, Message) else r for r in self.responses
        ]

    def wake(self) -> None:
        for reader in self.readers:
            reader.is_new.set()


class Replays:
    """Runs requests, and replays those that succeeded; lives on one asyncio loop.

    At most `max_runs` finished runs with `max_bytes` of responses are kept, for `ttl_s` each; the
    oldest go first. Runs that go on may record as much again, all together; beyond it the largest
    recording is given up: its readers get the whole answer, and who comes later a new run.
    """

    def __init__(
        self,
        max_runs: int,
        max_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_runs = max_runs
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._by_key: dict[RunKey, _Recording] = {}
        self._finished: dict[RunKey, _Recording] = {}  # those of `_by_key`, oldest first
        self._num_bytes = 0
        self._num_running_bytes = 0

    async def follow(
        self,
        key: RunKey,
        digest: bytes,
        run: Run,
        *,
        is_kept: bool,
        deadline_s: float,
        admit: Admit = admit_all,
    ) -> AsyncGenerator[Any, None]:
        """Yield the responses of the request that `key` names, running it unless it ran or runs.

        `digest` tells requests apart. Close the iterator (`aclosing`): the last reader that
        leaves ends the run. Without `is_kept` nobody else can come for it, and a response is
        forgotten once it was read. A run that ended by its own deadline is begun again for a
        reader whose `deadline_s` is later, unless that one has seen a part of it.

        Raises:
            InvalidFieldError: the id belongs to a different request.
            Exception: whatever `run` raised, or `admit`; that is not replayed.
        """
        while True:
            recording = self._find(key, digest)
            is_own = recording is None
            if recording is None:
                admit()
                recording = self._start(key, digest, run, is_kept)
            async with aclosing(self._read(key, recording)) as responses:
                async for response in responses:
                    yield response
            error = recording.error
            if error is None:
                return
            is_too_early = isinstance(error, (DeadlineError, TimeoutError))
            if is_own or recording.responses or not is_too_early or self._clock() >= deadline_s:
                raise error

    async def _read(self, key: RunKey, recording: _Recording) -> AsyncGenerator[Any, None]:
        """Yield a run's responses until it is over."""
        reader = _Reader()
        recording.readers.append(reader)
        try:
            while True:
                reader.is_new.clear()
                while reader.position < len(recording.responses):
                    yield recording.take(reader)
                if recording.is_over:
                    break
                await reader.is_new.wait()
        finally:
            recording.readers.remove(reader)
            await self.leave(key, recording)

    def _find(self, key: RunKey, digest: bytes) -> _Recording | None:
        self._expire()
        recording = self._by_key.get(key)
        if recording is not None and recording.digest != digest:
            state = "was answered a short time ago" if recording.is_over else "is running"
            raise InvalidFieldError.of(
                "request_id",
                f"is {key.request_id!r}, the id of a different request that {state}; must be new, "
                "or empty, or come with that same request",
            )
        return recording

    def _start(self, key: RunKey, digest: bytes, run: Run, is_kept: bool) -> _Recording:
        recording = _Recording(digest, is_kept)
        self._by_key[key] = recording
        recording.task = asyncio.create_task(self._run(key, recording, run))
        return recording

    async def _run(self, key: RunKey, recording: _Recording, run: Run) -> None:
        is_final = False
        try:
            is_final = await run(partial(self._record, recording))
        except BaseException as error:  # a cancellation, too; readers raise it again
            recording.error = error
        recording.is_over = True
        if recording.is_kept:
            self._num_running_bytes -= recording.size_bytes
        if recording.is_kept and is_final:
            self._keep(key, recording)
        else:
            self._forget(key, recording)
        recording.wake()

    def _record(self, recording: _Recording, response: Message) -> None:
        recording.emit(response)
        if not recording.is_kept:
            return
        size_bytes = response.ByteSize()
        recording.size_bytes += size_bytes
        self._num_running_bytes += size_bytes
        while self._num_running_bytes > self._max_bytes:
            self._give_up_largest()

    def _give_up_largest(self) -> None:
        """Record no more of the largest run that goes on; it goes on for its readers alone."""
        running = [(k, r) for k, r in self._by_key.items() if r.is_kept and not r.is_over]
        key, recording = max(running, key=lambda item: item[1].size_bytes)
        logger.warning(
            "request %r is not kept for a repetition: its answer and others that are under way "
            "exceed %d bytes (max_replay_mib)",
            key.request_id,
            self._max_bytes,
        )
        self._stop_recording(key, recording)
        recording.forget()

    def _stop_recording(self, key: RunKey, recording: _Recording) -> None:
        """Have a run that goes on be for its readers alone."""
        if recording.is_kept:
            self._num_running_bytes -= recording.size_bytes
        recording.is_kept = False
        self._forget(key, recording)

    def _keep(self, key: RunKey, recording: _Recording) -> None:
        recording.pack()
        recording.expires_s = self._clock() + self._ttl_s
        self._finished[key] = recording
        self._num_bytes += recording.size_bytes
        self._expire()

    def _expire(self) -> None:
        """Forget the oldest finished runs until all bounds hold."""
        while self._finished:
            key, recording = next(iter(self._finished.items()))
            is_over_bounds = (
                len(self._finished) > self._max_runs or self._num_bytes > self._max_bytes
            )
            if not is_over_bounds and self._clock() < recording.expires_s:
                break
            del self._finished[key]
            self._num_bytes -= recording.size_bytes
            self._forget(key, recording)

    def _forget(self, key: RunKey, recording: _Recording) -> None:
        if self._by_key.get(key) is recording:
            del self._by_key[key]

    async def leave(self, key: RunKey, recording: _Recording) -> None:
        """End a run without readers: nobody may join it from now on."""
        if recording.readers or recording.is_over:
            return
        self._stop_recording(key, recording)
        assert recording.task is not None
        recording.task.cancel()
        await asyncio.wait([recording.task])
