"""Who may touch what an engine works on, and whether it hangs in a step.

The engine's thread owns its work, but lets go of it while the model runs, so that another thread
can end an engine that hangs there. A clock cannot tell a hang: it goes on while a process is
stopped (SIGSTOP, a suspended machine). So only time counts that somebody looked at, in looks that
follow each other closely.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from serve.engine.turns import StepArbiter

# More than a look late, and the process was not running.
_MAX_LOOK_S = 1.0


class AbandonedError(Exception):
    """A step came to its end after the engine had been ended without it."""


class Watchdog:
    """Of one engine, which among those of `arbiter` has `priority`.

    `step`, `turn`, `unowned` and `idle` are for the engine's thread, `look`, to be called several
    times a second, and `abandon` for another.
    """

    def __init__(
        self,
        max_step_s: float,
        arbiter: StepArbiter | None = None,
        priority: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_step_s = max_step_s
        self.is_abandoned = False
        self._arbiter = arbiter
        self._priority = priority
        self._clock = clock
        self._ownership = threading.Lock()
        self._numbers = itertools.count(1)
        self._step = 0  # 0 while the engine waits, for work or for its turn
        self._looked_s = clock()
        self._seen_step = 0
        self._seen_s = 0.0

    # -- on the engine's thread -------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """Own the engine's work for the duration of the block, a step that may hang."""
        with self._ownership:
            self._step = next(self._numbers)
            try:
                yield
            finally:
                self._step = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Run the block, the model's part of a step, in this engine's turn and as `unowned`."""
        self._step = 0  # the wait for the turn is another engine's step
        self._ownership.release()
        try:
            with self._arbiter.turn(self._priority) if self._arbiter else nullcontext():
                if self.is_abandoned:
                    raise AbandonedError
                self._step = next(self._numbers)
                yield
        finally:
            self._take_back()

    @contextmanager
    def unowned(self) -> Iterator[None]:
        """Let other threads end the engine during the block. Raises AbandonedError if one did."""
        self._ownership.release()
        try:
            yield
        finally:
            self._take_back()

    def _take_back(self) -> None:
        self._ownership.acquire()
        if self.is_abandoned:
            raise AbandonedError

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Leave the cores to other engines for the duration of the block."""
        self.leave()
        yield
        if self._arbiter:
            self._arbiter.claim(self._priority)

    def leave(self) -> None:
        """Claim the cores no more."""
        if self._arbiter:
            self._arbiter.unclaim(self._priority)

    def owned(self) -> AbstractContextManager[object]:
        """Own the engine's work for the duration of the block; it may have been ended."""
        return self._ownership

    # -- on another thread ------------------------------------------------------------------

    def look(self) -> bool:
        """Say whether the engine has been in the same step for longer than `max_step_s`."""
        step, now_s = self._step, self._clock()
        elapsed_s = min(now_s - self._looked_s, _MAX_LOOK_S)
        self._looked_s = now_s
        if step == 0 or step != self._seen_step:
            self._seen_step, self._seen_s = step, 0.0
            return False
        self._seen_s += elapsed_s
        return self._seen_s > self.max_step_s

    def abandon(self, end: Callable[[], None]) -> None:
        """Call `end`, which ends the engine's work, without the engine's thread, which hangs.

        Where it hangs in what is not the model, its requests wait for it: it may be about to
        change what they are made of.
        """
        if self._arbiter:
            self._arbiter.drop(self._priority)
        if self._ownership.acquire(blocking=False):
            self.is_abandoned = True
            try:
                end()
            finally:
                self._ownership.release()
