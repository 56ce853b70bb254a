"""Sample groups of answers from the student for GRPO: tasks in, rollouts out, both JSONL.

    python examples/grpo_rollouts.py --target 127.0.0.1:50051 < tasks.jsonl > rollouts.jsonl

A task is {"prompt": ..., "answer": ...}. `prompt_token_ids` is the prompt as the student saw it, so
that a trainer need not apply its chat template again. `logprobs` are of the distribution that was
sampled: at the request's temperature, nothing truncated. The teacher is the reference; all in nats
per token.
Advantage: (reward - mean) / std of the group, 0 where rewards are equal (arXiv:2402.03300, 4.1.2).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, explain


def ask(prompt: str, answer: str, group_size: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        route=pb.ROUTE_STUDENT,
        messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)]),
        sampling=pb.SamplingParams(num_samples=group_size, max_tokens=64, temperature=1.0),
        divergence=pb.DivergenceOptions(enabled=True, per_token=True),
        evaluation=pb.EvaluationOptions(answer_format="last_number", reference_answer=answer),
        output=pb.OutputOptions(stream=False, return_prompt_token_ids=True),
    )


def rollouts(group: Sequence[pb.Sample]) -> list[dict[str, object]]:
    if not all(s.HasField("correct") and s.divergence.HasField("k3_mean") for s in group):
        return []  # a sample was cut off, or the teacher failed: what is absent is not 0
    rewards = [float(sample.correct) for sample in group]
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [
        {
            "completion_token_ids": list(sample.token_ids),
            "logprobs": list(sample.logprobs),
            "reference_logprobs": list(sample.divergence.reference_logprobs),
            "k3": list(sample.divergence.per_token_k3),
            "reward": reward,
            "advantage": (reward - mean) / std if std else 0.0,
        }
        for sample, reward in zip(group, rewards, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--group-size", type=int, default=8)
    arguments = parser.parse_args()
    with Client(arguments.target, timeout_s=300) as client:
        for task in map(json.loads, sys.stdin):
            request = ask(task["prompt"], task["answer"], arguments.group_size)
            group = client.generate(request).result()
            found = rollouts(group.samples)
            if not found:
                print(f"left out, a sample failed: {task['prompt']}", file=sys.stderr)
            prompt_token_ids = list(group.usage.roles[0].prompt_token_ids)
            prompt = {"prompt": task["prompt"], "prompt_token_ids": prompt_token_ids}
            for rollout in found:
                print(json.dumps({**prompt, **rollout}, allow_nan=False))


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(explain(error))
