"""Measure the KL between the models on texts of your own, exactly and by k3.

    python examples/score.py --target 127.0.0.1:50051 < texts.jsonl

A line is {"prompt": ..., "completion": ...}. `exact` is the mean over the completion's positions of
the full-vocabulary KL(policy ‖ reference), in nats per token. k3 sees only the tokens that stand
there: it estimates that KL where the policy wrote them, and is off where somebody else did.
`ln p` is the completion's log-probability, in nats, and `greedy` whether the policy would have
written it at temperature 0: what evaluations by log-likelihood ask for.
"""

import argparse
import json
import sys

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, explain


def ask(text: dict[str, str]) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        prompt=text["prompt"],
        completions=[pb.Completion(text=text["completion"])],
        divergence=pb.DivergenceOptions(enabled=True, exact=True),
    )


def row(score: pb.Score) -> str:
    kl = score.divergence
    k3 = f"{kl.k3_mean:7.4f}" if kl.HasField("k3_mean") else "      -"
    greedy = "yes" if all(score.is_greedy) else "no"
    likelihood = f"{score.sum_logprob:8.2f}  {greedy:6}"
    return f"{pb.Role.Name(kl.policy)}  {kl.num_tokens:6} {kl.exact_mean:7.4f} {k3} {likelihood}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051")
    arguments = parser.parse_args()
    print("policy        tokens   exact      k3    ln p  greedy  completion")
    with Client(arguments.target, timeout_s=300) as client:
        for text in map(json.loads, sys.stdin):
            for score in client.score(ask(text)).scores:
                print(f"{row(score)}  {text['completion']!r}")


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(explain(error))
