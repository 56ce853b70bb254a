"""A client of its own process that holds streams open until it is killed.

    python -m tests.faults.callers.held_client TARGET NUM_STREAMS

It says `asked` on stdout when all calls are on their way.
"""

from __future__ import annotations

import sys
import threading

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.inference_pb2_grpc import InferenceServiceStub


def main(target: str, num_streams: int) -> None:
    """Ask for answers that take longer than anybody waits, and read them as they come."""
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = InferenceServiceStub(channel)
        request = pb.GenerateRequest(
            route=pb.ROUTE_STUDENT,
            prompt_token_ids=pb.TokenIds(ids=[5, 6, 7]),
            sampling=pb.SamplingParams(max_tokens=4000, ignore_eos=True),
        )
        grpc.channel_ready_future(channel).result(timeout=30)
        for _ in range(num_streams):
            threading.Thread(target=list, args=(stub.Generate(request),), daemon=True).start()
        print("asked", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
