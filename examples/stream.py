"""Show the student's tokens as they come, then how much the teacher is surprised by each.

    python examples/stream.py --target 127.0.0.1:50051 "Name three colours."

The teacher scores the finished sample, so k3 per token (nats) comes with its end.
"""

import argparse
import itertools
import sys

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, explain


def ask(prompt: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        route=pb.ROUTE_STUDENT,
        messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)]),
        sampling=pb.SamplingParams(max_tokens=64, temperature=0.7),
        divergence=pb.DivergenceOptions(enabled=True, per_token=True),
    )


def pieces(sample: pb.Sample) -> list[str]:
    """Return the text that each token added; "" inside a character or for a special token."""
    return [sample.text[start:end] for start, end in itertools.pairwise((0, *sample.text_ends))]


def report(sample: pb.Sample) -> None:
    print(f"\n[{pb.FinishReason.Name(sample.finish_reason)}]")
    if not sample.HasField("divergence"):
        print(f"no k3: {sample.error or sample.divergence_error}")
        return
    for piece, k3 in zip(pieces(sample), sample.divergence.per_token_k3, strict=True):
        print(f"{k3:9.4f} {piece!r}")
    print(f"{sample.divergence.k3_sum:9.4f} in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--target", default="127.0.0.1:50051")
    arguments = parser.parse_args()
    with Client(arguments.target) as client, client.generate(ask(arguments.prompt)) as stream:
        for event in stream:
            print(event.tokens.text, end="", flush=True)
            if event.HasField("complete"):
                report(event.complete.sample)


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(explain(error))
