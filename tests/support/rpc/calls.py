"""Calls that fail, and what a server counts of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest


def failure(call: Callable[[], Any]) -> Any:
    """Return the `grpc.RpcError` of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value
