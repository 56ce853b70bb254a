"""Divergences that are taken behind a load are those that the server gives inline."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, Phase, RequestRecord, SampleRecord
from loadtest.scoring import score_samples
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from serve.pair.served import Role
from tests.support.load_tests import planned, recorded

PROMPT = DatasetPrompt("p", "2+3=")
ROLES = {"student": pb.ROLE_STUDENT, "teacher": pb.ROLE_TEACHER}


def answer(live: Any, arm: str, temperature: float) -> list[pb.Sample]:
    request = pb.GenerateRequest(
        messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=PROMPT.text)]),
        route=pb.Route.Value(f"ROUTE_{arm.upper()}"),
        sampling=pb.SamplingParams(num_samples=3, max_tokens=12, temperature=temperature, seed=5),
        divergence=pb.DivergenceOptions(enabled=True, exact=True),
    )
    return list(live.client.generate(request).result().samples)


def to_record(arm: str, samples: list[pb.Sample], phase: Phase = Phase.MEASURED) -> RequestRecord:
    found = [SampleRecord(sample.index, token_ids=list(sample.token_ids)) for sample in samples]
    return recorded(planned(arm=arm, phase=phase), samples=found)


def score(live: Any, records: list[RequestRecord], temperature: float = 1.0) -> tuple[str, Any]:
    config = RunConfig(out=Path("unused"), temperature=temperature, divergence="exact")
    progress: list[tuple[int, int]] = []

    async def run() -> str:
        async with AsyncClient(live.server.address, timeout_s=30, max_attempts=1) as client:
            return await score_samples(
                client, config, {"p": PROMPT}, records, lambda *done: progress.append(done)
            )

    return asyncio.run_coroutine_threadsafe(run(), live.loop).result(60), progress


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_divergences_are_those_of_inline_scoring(live: Any, temperature: float) -> None:
    inline = {arm: answer(live, arm, temperature) for arm in ROLES}
    records = [to_record(arm, samples) for arm, samples in inline.items()]
    problem, progress = score(live, records, temperature)
    assert not problem
    assert sorted(progress) == [(1, 2), (2, 2)]
    for record in records:
        for mine, theirs in zip(record.samples, inline[record.plan.arm], strict=True):
            assert mine.k3_sum == pytest.approx(theirs.divergence.k3_sum, abs=1e-4)
            assert mine.exact_kl_mean == pytest.approx(theirs.divergence.exact_mean, abs=1e-6)
            assert mine.num_kl_tokens == theirs.divergence.num_tokens == len(mine.per_token_k3)


def test_warmup_failures_and_empty_samples_are_left_out(live: Any) -> None:
    samples = answer(live, "student", 1.0)
    warmup = to_record("student", samples, Phase.WARMUP)
    failed = to_record("student", samples)
    failed.status = "UNAVAILABLE"
    empty = to_record("student", [])
    assert score(live, [warmup, failed, empty]) == ("", [])
    assert all(s.k3_sum is None for r in (warmup, failed) for s in r.samples)


def test_server_that_cannot_compare_is_told_and_leaves_no_divergence(
    serving: Any, make_pair: Any, make_tokenizer: Any
) -> None:
    tokenizers = {Role.TEACHER: make_tokenizer(extra="one more")}
    with serving(make_pair(tokenizers_by_role=tokenizers)) as live:
        record = to_record("student", [pb.Sample(token_ids=[5, 6])])
        problem, _ = score(live, [record])
    assert "FAILED_PRECONDITION" in problem
    assert record.samples[0].k3_sum is None
