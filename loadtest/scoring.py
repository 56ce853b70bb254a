"""Divergences of a run's samples, taken when the load is over so that they disturb no latency."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import grpc

from loadtest.client.targets import Credentials
from loadtest.config import RunConfig
from loadtest.progress import ProgressReporter
from loadtest.records import DatasetPrompt, Phase, RequestRecord, SampleRecord
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient, explain

_ROLES = {"student": pb.ROLE_STUDENT, "teacher": pb.ROLE_TEACHER}
# Requests scored at a time: enough that neither model waits for the other's pass.
_NUM_CONCURRENT = 4
_TIMEOUT_S = 300.0


def score_run(
    config: RunConfig,
    prompts: Mapping[str, DatasetPrompt],
    records: Sequence[RequestRecord],
    credentials: Credentials,
    reporter: ProgressReporter,
) -> str:
    """Set the records' divergences; returns why there are none, or not all, or ""."""
    if config.divergence == "none":
        return "not asked for"
    if config.protocol != "tandem":
        return "only a Tandem server scores"

    async def score() -> str:
        async with AsyncClient(
            config.target,
            token=credentials.token,
            tls=credentials.tls,
            timeout_s=_TIMEOUT_S,
        ) as client:
            return await score_samples(client, config, prompts, records, on_done)

    with reporter.track("divergences") as on_done:
        try:
            problem = asyncio.run(score())
        except KeyboardInterrupt:
            problem = "interrupted"
    if problem:
        reporter.say(f"divergences are missing: {problem}")
    return problem


async def score_samples(
    client: AsyncClient,
    config: RunConfig,
    prompts: Mapping[str, DatasetPrompt],
    records: Sequence[RequestRecord],
    on_progress: Callable[[int, int], None],
) -> str:
    """Set the samples' divergences, the arm as the policy; returns why they are missing, or "".

    The first failure ends it: the samples behind it stay without. `on_progress` is told how many
    requests are done, of how many.
    """
    waiting = [record for record in records if _is_scorable(record)]
    turns = asyncio.Semaphore(_NUM_CONCURRENT)
    num_done = 0

    async def score(record: RequestRecord) -> None:
        nonlocal num_done
        async with turns:
            await _score(client, config, prompts[record.plan.prompt_id], record)
        num_done += 1
        on_progress(num_done, len(waiting))

    failures: list[str] = []
    try:
        async with asyncio.TaskGroup() as group:
            for record in waiting:
                group.create_task(score(record))
    except* grpc.RpcError as errors:
        failures += [explain(error) for error in errors.exceptions if _is_rpc_error(error)]
    return failures[0] if failures else ""


def _is_rpc_error(error: object) -> TypeGuard[grpc.RpcError]:
    return isinstance(error, grpc.RpcError)


def _is_scorable(record: RequestRecord) -> bool:
    is_known = record.plan.arm in _ROLES and record.plan.phase is Phase.MEASURED
    return is_known and record.is_ok and any(sample.token_ids for sample in record.samples)


async def _score(
    client: AsyncClient, config: RunConfig, prompt: DatasetPrompt, record: RequestRecord
) -> None:
    """Score one request's samples under both models, at the temperature they were drawn at."""
    samples = [sample for sample in record.samples if sample.token_ids]
    role = _ROLES[record.plan.arm]
    response = await client.score(
        pb.ScoreRequest(
            messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt.text)]),
            completions=[
                pb.Completion(token_ids=pb.TokenIds(ids=sample.token_ids)) for sample in samples
            ],
            temperature=config.temperature or 1.0,
            divergence=pb.DivergenceOptions(
                enabled=True, per_token=True, exact=config.divergence == "exact"
            ),
        )
    )
    scores = {score.index: score for score in response.scores if score.role == role}
    for index, sample in enumerate(samples):
        _take(sample, scores[index].divergence)


def _take(sample: SampleRecord, divergence: pb.Divergence) -> None:
    sample.k3_sum = divergence.k3_sum
    sample.num_kl_tokens = divergence.num_tokens - divergence.nonfinite_tokens
    sample.per_token_k3 = list(divergence.per_token_k3)
    if divergence.HasField("exact_mean"):
        sample.exact_kl_mean = divergence.exact_mean
