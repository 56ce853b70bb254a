"""Waits for what another thread or process will do."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], object], timeout_s: float = 60.0, what: str = "it") -> None:
    """Return when `is_so` returns something true; AssertionError if that takes too long."""
    until_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.005)
