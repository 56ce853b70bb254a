from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from bundle.errors import UserError
from loadtest.client.targets import Credentials, RequestFailedError, TandemTarget
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, RequestRecord
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1 import inference_pb2_grpc
from tests.support.load_tests import planned
from tests.support.rpc.listening import listening

CODE = grpc.StatusCode
PROMPTS = {
    "sum": DatasetPrompt("sum", "2 + 2 =", reference_answer="4", answer_format="last_number"),
    "tale": DatasetPrompt("tale", "Once", max_tokens=3, ignore_eos=True),
}
USAGE = pb.GenerateResponse(
    usage=pb.Usage(roles=[pb.RoleUsage(role=pb.ROLE_STUDENT, prompt_tokens=9)])
)


def tokens(*ids: int, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=pb.TokenChunk(index=index, token_ids=ids))


def complete(index: int = 0, **fields: Any) -> pb.GenerateResponse:
    sample = pb.Sample(index=index, finish_reason=pb.FINISH_REASON_STOP, **fields)
    return pb.GenerateResponse(complete=pb.Complete(sample=sample))


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    """Plays steps: an event is sent, a number of seconds passes, a code ends the call."""

    def __init__(self, steps: Iterable[pb.GenerateResponse | float | CODE]) -> None:
        self.steps = list(steps)
        self.requests: list[pb.GenerateRequest] = []
        self.roles = [pb.ROLE_STUDENT, pb.ROLE_TEACHER]
        self.is_over = threading.Event()

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        for step in self.steps:
            if isinstance(step, pb.GenerateResponse):
                yield step
            elif isinstance(step, CODE):
                context.abort(step, "not now")
            else:
                self.is_over.wait(step)

    def GetModels(self, request: Any, context: Any) -> pb.GetModelsResponse:  # noqa: N802
        return pb.GetModelsResponse(models=[pb.Model(role=role) for role in self.roles])


@contextmanager
def serving(service: Scripted) -> Iterator[str]:
    with listening(service) as target:
        try:
            yield target
        finally:
            service.is_over.set()


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


def config_of(target: str, **settings: Any) -> RunConfig:
    return RunConfig(target=target, out=Path("unused"), **{"timeout_s": 60, **settings})


def record_of(arm: str = "student", prompt_id: str = "sum") -> RequestRecord:
    plan = planned(arm=arm, prompt_id=prompt_id, seed=7)
    return RequestRecord(plan, sent_s=0.0)


async def send(config: RunConfig, record: RequestRecord) -> RequestFailedError | None:
    """Send by a clock that goes on by a second whenever it is read."""
    target, ticks = TandemTarget(config, PROMPTS), itertools.count(1.0)
    try:
        await target.send(record, lambda: next(ticks))
    except RequestFailedError as failed:
        return failed
    finally:
        await target.close()
    return None


def test_every_token_has_its_arrival_time(run: Any) -> None:
    last = complete(token_ids=[5, 6, 7], text="= 4", answer="4", correct=True)
    with serving(Scripted([tokens(5), tokens(6, 7), last, USAGE])) as target:
        record = record_of()
        assert run(send(config_of(target), record)) is None
    (sample,) = record.samples
    assert sample.token_times_s == [1, 2, 2]
    assert (sample.token_ids, sample.text) == ([5, 6, 7], "= 4")
    assert (sample.answer, sample.is_correct, sample.finish_reason) == ("4", True, "STOP")
    assert record.num_prompt_tokens == 9


def test_answer_and_judgement_may_be_missing(run: Any) -> None:
    with serving(Scripted([complete(text="?"), USAGE])) as target:
        record = record_of()
        assert run(send(config_of(target), record)) is None
    assert (record.samples[0].answer, record.samples[0].is_correct) == (None, None)


def test_samples_are_kept_apart(run: Any) -> None:
    steps = [tokens(8, index=1), tokens(5), complete(1, token_ids=[8]), complete(0, token_ids=[5])]
    with serving(Scripted([*steps, USAGE])) as target:
        record = record_of()
        assert run(send(config_of(target, num_samples=2), record)) is None
    assert [(s.index, s.token_ids, len(s.token_times_s)) for s in record.samples] == [
        (0, [5], 1),
        (1, [8], 1),
    ]


def test_request_says_all_that_the_run_asks_for(run: Any) -> None:
    service = Scripted([complete(), USAGE])
    with serving(service) as target:
        config = config_of(target, num_samples=3, temperature=0.5, max_tokens=11)
        run(send(config, record_of("teacher")))
        run(send(config, record_of("student", "tale")))
    judged, free = service.requests
    assert judged.request_id and judged.request_id != free.request_id
    judged.request_id = ""
    assert judged == pb.GenerateRequest(
        route=pb.ROUTE_TEACHER,
        messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="2 + 2 =")]),
        sampling=pb.SamplingParams(
            num_samples=3, temperature=0.5, max_tokens=11, seed=7, ignore_eos=False
        ),
        divergence=pb.DivergenceOptions(enabled=False),
        evaluation=pb.EvaluationOptions(answer_format="last_number", reference_answer="4"),
        output=pb.OutputOptions(logprobs=False),
    )
    assert (free.route, free.sampling.max_tokens) == (pb.ROUTE_STUDENT, 3)
    assert free.sampling.ignore_eos and not free.HasField("evaluation")


@pytest.mark.parametrize("code", [CODE.RESOURCE_EXHAUSTED, CODE.UNAVAILABLE, CODE.INTERNAL])
def test_refusal_is_its_status_and_sent_once(run: Any, code: CODE) -> None:
    service = Scripted([code])
    with serving(service) as target:
        failed = run(send(config_of(target), record_of()))
    assert (failed.status, failed.text) == (code.name, "not now")
    assert len(service.requests) == 1


def test_failure_keeps_the_tokens_before_it(run: Any) -> None:
    with serving(Scripted([tokens(5), tokens(6), CODE.UNAVAILABLE])) as target:
        record = record_of()
        assert run(send(config_of(target), record)).status == "UNAVAILABLE"
    assert record.samples[0].token_ids == [5, 6]
    assert len(record.samples[0].token_times_s) == 2


def test_deadline_is_the_configured_one(run: Any) -> None:
    with serving(Scripted([30.0])) as target:
        failed = run(send(config_of(target, timeout_s=0.2), record_of()))
    assert failed.status == "DEADLINE_EXCEEDED"


def test_stream_without_its_last_message_is_incomplete(run: Any) -> None:
    with serving(Scripted([tokens(5), complete(token_ids=[5])])) as target:
        failed = run(send(config_of(target), record_of()))
    assert failed.status == "INCOMPLETE"
    assert "without Usage" in failed.text


async def check(config: RunConfig) -> None:
    target = TandemTarget(config, PROMPTS)
    try:
        await target.check()
    finally:
        await target.close()


def test_arms_must_be_served(run: Any) -> None:
    service = Scripted([])
    with serving(service) as target:
        run(check(config_of(target)))
        with pytest.raises(UserError, match="not serve tutor; it has student, teacher"):
            run(check(config_of(target, arms=("student", "tutor"))))
        service.roles = []
        with pytest.raises(UserError, match="not serve student, teacher; it has no models"):
            run(check(config_of(target)))


def test_server_that_is_not_there_is_named(run: Any, free_target: str) -> None:
    with pytest.raises(UserError, match=f"--target {free_target}: UNAVAILABLE"):
        run(check(config_of(free_target)))


@pytest.fixture
def free_target() -> Iterator[str]:
    """An address where nobody listens: bound, so that nobody else can, too."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_token_is_not_sent_in_clear() -> None:
    with pytest.raises(ValueError, match="in clear"):
        TandemTarget(config_of("example.com:1"), PROMPTS, Credentials(token="secret"))
    assert "secret" not in repr(Credentials(token="secret"))
