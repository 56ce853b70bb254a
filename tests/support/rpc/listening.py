"""A gRPC server of one scripted service, on a port of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from protos.tandem.v1 import inference_pb2_grpc


@contextmanager
def listening(
    service: Any,
    add: Callable[..., None] = inference_pb2_grpc.add_InferenceServiceServicer_to_server,
    num_threads: int = 8,
) -> Iterator[str]:
    """Serve until the block ends; yields the address. `add` puts the service into a server."""
    server = grpc.server(ThreadPoolExecutor(num_threads))
    add(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
