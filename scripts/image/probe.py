"""What a client sees of a server on this container's loopback; run by the image's own Python.

    python -c "$(cat probe.py)" answer     gRPC health and a Compare, as one line of JSON
    python -c "$(cat probe.py)" drain      `running` at a stream's first token, then how it ended

scripts/image/proofs.py runs it in a container that shares the server's network and nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client

TARGET = "127.0.0.1:50051"
TIMEOUT_S = 120
PROMPT = "The sea is"
# Of each sample that runs while the server is told to end: seconds of work, for tiny models too.
DRAIN_TOKENS = 128

Facts = dict[str, object]


def answer() -> Facts:
    with grpc.insecure_channel(TARGET) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        status = check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
    with Client(TARGET, timeout_s=TIMEOUT_S) as client:
        response = client.compare(
            pb.CompareRequest(prompt=PROMPT, sampling=sampling(num_samples=2, max_tokens=16))
        )
    health = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return {"health": health, "samples": describe(response.samples)}


def drain() -> Facts:
    request = pb.GenerateRequest(
        route=pb.ROUTE_BOTH,
        prompt=PROMPT,
        sampling=sampling(num_samples=4, max_tokens=DRAIN_TOKENS),
    )
    samples = []
    with Client(TARGET, timeout_s=TIMEOUT_S) as client, client.generate(request) as stream:
        for number, event in enumerate(stream):
            if number == 0:
                print("running", flush=True)
            if event.HasField("complete"):
                samples.append(event.complete.sample)
    return {"ended_at": time.time(), "samples": describe(samples)}


def sampling(num_samples: int, max_tokens: int) -> pb.SamplingParams:
    return pb.SamplingParams(
        num_samples=num_samples, max_tokens=max_tokens, ignore_eos=True, temperature=0.8, seed=1
    )


def describe(samples: Iterable[pb.Sample]) -> list[Facts]:
    return [
        {
            "role": pb.Role.Name(sample.role),
            "num_tokens": len(sample.token_ids),
            "finish_reason": pb.FinishReason.Name(sample.finish_reason),
            "k3_mean": sample.divergence.k3_mean if sample.HasField("divergence") else None,
        }
        for sample in samples
    ]


if __name__ == "__main__":
    print(json.dumps({"answer": answer, "drain": drain}[sys.argv[1]]()))
