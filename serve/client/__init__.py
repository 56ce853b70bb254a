"""How does a program talk to a server? The public names of the Python client stand here.

with Client("127.0.0.1:50051", timeout_s=60) as client:
    response = client.compare(pb.CompareRequest(prompt="Hello"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.client.channel import CHANNEL_OPTIONS, Tls
    from serve.client.client import AsyncClient, Client, ControlClient
    from serve.client.failures import explain, retry_delay_s, violations
    from serve.client.streams import (
        AsyncGenerateStream,
        GenerateStream,
        Generation,
        IncompleteStreamError,
    )

__all__ = [
    "CHANNEL_OPTIONS",
    "AsyncClient",
    "AsyncGenerateStream",
    "Client",
    "ControlClient",
    "GenerateStream",
    "Generation",
    "IncompleteStreamError",
    "Tls",
    "explain",
    "retry_delay_s",
    "violations",
]
_MODULES = {
    "CHANNEL_OPTIONS": "channel", "Tls": "channel",
    "AsyncClient": "client", "Client": "client", "ControlClient": "client",
    "explain": "failures", "retry_delay_s": "failures", "violations": "failures",
    "AsyncGenerateStream": "streams", "GenerateStream": "streams", "Generation": "streams",
    "IncompleteStreamError": "streams",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for: flags and help need no gRPC."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
