"""How does a program talk to a server? The public names of the Python client stand here.

with Client("127.0.0.1:50051", timeout_s=60) as client:
    response = client.compare(pb.CompareRequest(prompt="Hello"))
"""

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
