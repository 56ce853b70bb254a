"""Whether an engine hangs in a step.

A clock cannot tell: it goes on while a process is stopped (SIGSTOP, a suspended machine). So only
time counts that somebody looked at, in looks that follow each other closely.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# More than a look late, and the process was not running.
_MAX_LOOK_S = 1.0


class StepWatch:
    """Adds up the time between looks that find an engine in the same step."""

    def __init__(self, max_step_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_step_s = max_step_s
        self._clock = clock
        self._looked_s = clock()
        self._step = 0
        self._seen_s = 0.0

    def look(self, step: int) -> bool:
        """Say whether `step` has lasted for longer than `max_step_s`; 0 is in no step.

        To be called several times a second, with another number for each step.
        """
        elapsed_s = min(self._clock() - self._looked_s, _MAX_LOOK_S)
        self._looked_s = self._clock()
        if step == 0 or step != self._step:
            self._step, self._seen_s = step, 0.0
            return False
        self._seen_s += elapsed_s
        return self._seen_s > self._max_step_s
