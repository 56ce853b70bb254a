"""The load tester's targets against a real server over fake models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estimators.answers import extract
from estimators.canonical import canonicalise
from loadtest.client.oip_target import OipTarget
from loadtest.client.targets import LoadTarget, TandemTarget
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, RequestRecord
from protos.tandem.v1 import inference_pb2 as pb
from tests.support.load_tests import planned

PROMPT = DatasetPrompt("sum", "1+1=", reference_answer="2", answer_format="last_number")
TARGETS = {"tandem": TandemTarget, "oip": OipTarget}


@pytest.fixture
def run(loop: asyncio.AbstractEventLoop) -> Callable[..., Any]:
    """Runs on the server's loop: grpc.aio dislikes several at a time."""
    return lambda exchanging: asyncio.run_coroutine_threadsafe(exchanging, loop).result(30)


@pytest.fixture(params=["tandem", "oip"])
def config(request: Any, live: Any) -> RunConfig:
    return config_of(live, protocol=request.param)


def config_of(live: Any, **settings: Any) -> RunConfig:
    return RunConfig(
        target=live.server.address, out=Path("unused"), max_tokens=8, num_samples=2, **settings
    )


async def exchange(config: RunConfig, arm: str, prompt: DatasetPrompt = PROMPT) -> RequestRecord:
    target: LoadTarget = TARGETS[config.protocol](config, {prompt.prompt_id: prompt})
    plan = planned(arm=arm, prompt_id=prompt.prompt_id, seed=7)
    record = RequestRecord(plan, sent_s=time.monotonic())
    try:
        await target.check()
        await target.send(record, time.monotonic)
    finally:
        await target.close()
    return record


@pytest.mark.parametrize("arm", ["student", "teacher"])
def test_record_is_what_the_server_says(live: Any, run: Any, config: RunConfig, arm: str) -> None:
    record = run(exchange(config, arm))
    expected = [asked(live, config, arm, index) for index in range(2)]
    for sample, message in zip(record.samples, expected, strict=True):
        assert sample.token_ids == list(message.token_ids)
        assert len(sample.token_times_s) == len(sample.token_ids)
        assert sample.text == message.text
        assert sample.finish_reason in ("STOP", "LENGTH")
        assert sample.answer == canonicalise(extract(message.text, "last_number"))
        assert sample.is_correct == (sample.answer == "2")
        assert sample.token_times_s == sorted(sample.token_times_s)
    if config.protocol == "tandem":
        assert record.num_prompt_tokens > len(PROMPT.text)


def asked(live: Any, config: RunConfig, arm: str, index: int) -> pb.Sample:
    """A sample as the server's own client gets it."""
    is_oip = config.protocol == "oip"
    request = pb.GenerateRequest(
        route=f"ROUTE_{arm.upper()}",
        sampling=pb.SamplingParams(
            max_tokens=8, num_samples=1 if is_oip else 2, seed=7 + index if is_oip else 7
        ),
    )
    if is_oip:
        request.prompt = PROMPT.text
    else:
        request.messages.messages.add(role="user", content=PROMPT.text)
    sample: pb.Sample = live.client.generate(request).result().samples[0 if is_oip else index]
    return sample


def test_prompt_that_ignores_eos_gets_its_length(run: Any, config: RunConfig) -> None:
    prompt = DatasetPrompt("long", "1+1=", max_tokens=60, ignore_eos=True)
    record = run(exchange(config, "student", prompt))
    assert [len(sample.token_ids) for sample in record.samples] == [60, 60]
