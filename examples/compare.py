"""Ask both models one prompt, and say for each sample how far the other model is from it.

    python examples/compare.py --target 127.0.0.1:50051 "Tom has 6 apples and eats 2. How many?"

k3 is GRPO's estimate of KL(writer ‖ other model), in nats per token.
"""

import argparse
import sys

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, explain


def ask(prompt: str, num_samples: int) -> pb.CompareRequest:
    return pb.CompareRequest(
        messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)]),
        sampling=pb.SamplingParams(num_samples=num_samples, max_tokens=64),
        evaluation=pb.EvaluationOptions(answer_format="last_number"),
    )


def distance(sample: pb.Sample) -> str:
    """Say how far, or why it is not known: a missing divergence is not a divergence of 0."""
    if sample.divergence.HasField("k3_mean"):
        return f"k3 {sample.divergence.k3_mean:.4f} over {sample.divergence.num_tokens} tokens"
    return f"no k3: {sample.error or sample.divergence_error or 'no finite token'}"


def verdict(agreement: pb.Agreement) -> str:
    if not agreement.HasField("same_answer"):
        return "no verdict: a model has no majority answer"
    says = "the same answer" if agreement.same_answer else "different answers"
    return f"{says}: student {agreement.student.answer}, teacher {agreement.teacher.answer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--num-samples", type=int, default=4)
    arguments = parser.parse_args()
    with Client(arguments.target, timeout_s=300) as client:
        response = client.compare(ask(arguments.prompt, arguments.num_samples))
    for sample in response.samples:
        print(f"{pb.Role.Name(sample.role)} {sample.index}: {distance(sample)}")
        print(f"  {sample.text!r}")
    print(verdict(response.agreement))


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(explain(error))
