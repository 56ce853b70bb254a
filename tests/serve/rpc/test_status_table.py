"""Every status code over a real channel, by each kind of condition that has it.

Each time: the code, the path of the field where there is one, what the details must say, and that
a good request is served right after. Every bound of a field: test_validation. CANCELLED by an
operator: test_control. UNAVAILABLE while the server drains: tests/serve/app/test_server.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, retry_delay_s, violations
from serve.pair.served import Role
from tests.support.polling import wait_until
from tests.support.rpc.calls import failure

CODE = grpc.StatusCode
TOKEN = "a-token"
HASH = re.compile("[0-9a-f]{64}")
POISON = "!"  # behind it the student's logits are NaN
LONG = pb.SamplingParams(max_tokens=90_000, ignore_eos=True)

Call = Callable[[Any], Any]


def generate(**fields: Any) -> Call:
    request = pb.GenerateRequest(**({"prompt": "x"} | fields))
    return lambda live: live.client.generate(request).result()


def compare(**fields: Any) -> Call:
    request = pb.CompareRequest(**({"prompt": "x"} | fields))
    return lambda live: live.client.compare(request)


def score(**fields: Any) -> Call:
    completions = [pb.Completion(text="y")]
    request = pb.ScoreRequest(**({"prompt": "x", "completions": completions} | fields))
    return lambda live: live.client.score(request)


def sampling(**fields: Any) -> Call:
    return generate(sampling=pb.SamplingParams(**fields))


def divergence(**fields: Any) -> Call:
    return generate(divergence=pb.DivergenceOptions(**fields))


def raw(rpc: str, data: bytes) -> Call:
    path = f"/tandem.v1.InferenceService/{rpc}"
    return lambda live: live.channel.unary_unary(path)(data, timeout=10)


@dataclass(frozen=True)
class Row:
    """One condition: how to have it, and what is to be seen of it."""

    name: str
    provoke: Call
    code: grpc.StatusCode
    fields: tuple[str, ...] = ()
    says: str = ""
    pair: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    retry_after_s: float | None = None
    rejection: str = ""
    student_is_poisoned: bool = False
    tokenizers_differ: bool = False


def queue_behind(live: Any, call: Call) -> Any:
    """Make the call while the only slots are taken by a request that does not end."""
    stream = live.client.generate(pb.GenerateRequest(prompt="x", sampling=LONG))
    next(stream)
    try:
        return call(live)
    finally:
        stream.close()


def give_up_in_the_queue(live: Any) -> Any:
    """Let the deadline pass in the queue; the model must never see the prompt."""
    request = pb.GenerateRequest(prompt="never seen", route=pb.ROUTE_STUDENT)

    def call(live: Any) -> Any:
        before = live.pair.value("prompt_tokens_total", role="student")
        try:
            return live.client.generate(request, timeout_s=0.5).result()
        finally:
            assert live.pair.value("prompt_tokens_total", role="student") == before

    return queue_behind(live, call)


def fill_the_queue(live: Any) -> Any:
    return queue_behind(live, generate(sampling=pb.SamplingParams(num_samples=3)))


def exceed_the_peer_limit(live: Any) -> Any:
    return queue_behind(live, generate())


@pytest.fixture
def poisoned(make_pair: Any, tokenizer: Any) -> torch.Tensor:
    """A student like the others, with NaN behind POISON."""
    logits: torch.Tensor = make_pair().backends[Role.STUDENT].logits
    logits[list(tokenizer.encode(POISON))] = torch.nan
    return logits


def meet_a_bug(live: Any) -> Any:
    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("a secret of the server")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live.pair.engines.student.engine, "submit", fail)
        return generate()(live)


def break_the_engine(live: Any) -> Any:
    """Have the model fail in a step: what was in flight ends, the engine goes on."""
    backend = live.pair.backends[Role.STUDENT]
    backend.error = RuntimeError("a secret of the model")
    try:
        return generate(route=pb.ROUTE_STUDENT)(live)
    finally:
        backend.error = None


def stop_the_teacher(live: Any) -> Any:
    live.pair.engines.teacher.engine.stop()
    return generate(route=pb.ROUTE_TEACHER)(live)


ONE_SLOT = {"max_num_seqs": 1, "max_waiting": 2, "max_model_len": 100_000}
ALONE = {"roles": (Role.STUDENT,)}
INVALID, RANGE = CODE.INVALID_ARGUMENT, CODE.OUT_OF_RANGE
IDS = pb.TokenIds(ids=[5])
BOTH_FORMS = b"".join(
    pb.CompareRequest(**fields).SerializeToString()
    for fields in ({"prompt": "x"}, {"prompt_token_ids": IDS})
)

ROWS = [
    Row("malformed protobuf", raw("Compare", b"\xff\xff"), INVALID, says="not a valid tandem.v1"),
    Row("bad UTF-8", raw("Generate", b"\x1a\x02\xff\xfe"), INVALID, says="not a valid tandem.v1"),
    Row("two at once", sampling(min_p=2, top_p=0), INVALID, ("sampling.top_p", "sampling.min_p")),
    Row("text and ids both", raw("Compare", BOTH_FORMS), INVALID, ("prompt", "prompt_token_ids")),
    Row("prompt over the server's limit", generate(prompt="x" * 101), INVALID, ("prompt",),
        settings={"max_prompt_bytes": 100}),
    Row("prompt and max_tokens over the context", sampling(max_tokens=256), RANGE,
        ("sampling.max_tokens",), "1 prompt tokens + max_tokens 256 = 257 exceed the context of"),
    Row("prompt fills the context", generate(prompt="x" * 256), RANGE, ("prompt",),
        "256 prompt tokens leave no room for a completion in the context of 256 tokens"),
    Row("prompt and min_tokens over the context",
        generate(prompt="x" * 240, sampling=pb.SamplingParams(min_tokens=17)), RANGE,
        ("sampling.min_tokens",), "240 prompt tokens + min_tokens 17 = 257 exceed"),
    Row("completion over the context", score(completions=[pb.Completion(text="y" * 256)]), RANGE,
        ("completions[0]",), "257 tokens, the context takes 256"),
    Row("never fits the queue", sampling(num_samples=4), RANGE, ("sampling.num_samples",),
        "num_samples 4 exceeds the 3",
        settings={"max_num_seqs": 1, "max_waiting": 2}),
    Row("KL with one model", divergence(enabled=True), CODE.FAILED_PRECONDITION, pair=ALONE,
        says="student alone"),
    Row("Compare with one model", compare(), CODE.FAILED_PRECONDITION, pair=ALONE),
    Row("KL with different tokenizers", divergence(enabled=True), CODE.FAILED_PRECONDITION,
        tokenizers_differ=True, says="both hashes"),
    Row("KL of one scored model", score(
            roles=[pb.ROLE_STUDENT], divergence=pb.DivergenceOptions(enabled=True)),
        CODE.FAILED_PRECONDITION),
    Row("unknown model", generate(route=pb.ROUTE_TEACHER), CODE.NOT_FOUND, pair=ALONE,
        says="loaded: student"),
    Row("unknown request id", lambda live: live.control.abort("nobody"), CODE.NOT_FOUND,
        says="'nobody'"),
    Row("queue full", fill_the_queue, CODE.RESOURCE_EXHAUSTED, pair=ONE_SLOT, retry_after_s=1.0,
        rejection="queue_full"),
    Row("too many calls of one client", exceed_the_peer_limit, CODE.RESOURCE_EXHAUSTED,
        pair={"max_model_len": 100_000}, settings={"max_concurrent_per_peer": 1},
        retry_after_s=1.0, rejection="peer_limit"),
    Row("engine down", stop_the_teacher, CODE.UNAVAILABLE, retry_after_s=1.0),
    Row("deadline in the queue", give_up_in_the_queue, CODE.DEADLINE_EXCEEDED, pair=ONE_SLOT),
    Row("deadline in decoding", generate(sampling=LONG), CODE.DEADLINE_EXCEEDED,
        pair={"max_model_len": 100_000}, settings={"max_timeout_s": 1.0}, says="deadline"),
    Row("non-finite logits", generate(prompt=POISON, route=pb.ROUTE_STUDENT), CODE.INTERNAL,
        student_is_poisoned=True, says="error id"),
    Row("non-finite logits in Score", score(prompt=POISON), CODE.INTERNAL,
        student_is_poisoned=True, says="error id"),
    Row("failing model", break_the_engine, CODE.INTERNAL, says="error id"),
    Row("bug", meet_a_bug, CODE.INTERNAL, says="internal error; error id"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_condition_has_its_status_and_the_server_goes_on(
    serving: Any, make_pair: Any, make_tokenizer: Any, poisoned: torch.Tensor, row: Row
) -> None:
    pair = dict(row.pair)
    if row.student_is_poisoned:
        pair["student"] = poisoned
    if row.tokenizers_differ:
        pair["tokenizers_by_role"] = {Role.TEACHER: make_tokenizer(extra="one more")}
    with serving(make_pair(**pair), **row.settings) as live:
        series = series_of_calls(live)
        error = failure(lambda: row.provoke(live))
        assert error.code() is row.code, error.details()
        check(row, error)
        wait_until(lambda: count_calls(live, row.code) == 1)
        if row.rejection:
            assert live.pair.value("admission_rejections_total", reason=row.rejection) == 1
        good = pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(max_tokens=2, seed=0))
        if row.tokenizers_differ:
            good.divergence.enabled = False
        assert live.client.generate(good).result().samples[0].token_ids
        wait_until(lambda: live.control.status().num_requests == 0)
        # No series begins with an event, which increase() would not see.
        assert series_of_calls(live) == series


def count_calls(live: Any, code: grpc.StatusCode) -> float:
    """Return how many calls ended with a code by the server's own count."""
    samples = calls_of(live)
    return sum(sample.value for sample in samples if sample.labels["code"] == code.name)


def series_of_calls(live: Any) -> set[tuple[str, ...]]:
    return {tuple(sample.labels.values()) for sample in calls_of(live)}


def calls_of(live: Any) -> list[Any]:
    (family,) = (
        family
        for family in live.pair.metrics.registry.collect()
        if family.name == "tandem_requests"
    )
    return list(family.samples)


def check(row: Row, error: Any) -> None:
    """What the details say: fields, retry delay, text; and nothing of the server's inside."""
    assert tuple(violations(error)) == row.fields
    if row.says == "both hashes":
        assert len(set(HASH.findall(error.details()))) == 2
    else:
        assert row.says in error.details()
    assert retry_delay_s(error) == row.retry_after_s
    if row.retry_after_s:
        assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
    assert "secret" not in error.details() and "Traceback" not in error.details()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    hashed = hashlib.sha256(TOKEN.encode()).hexdigest()
    path.write_text(f"ada {hashed} inference\n")
    return path


@pytest.mark.parametrize("token", [None, "another-token"])
def test_no_or_wrong_credentials_are_unauthenticated(
    serving: Any, make_pair: Any, tokens: Path, token: str | None
) -> None:
    with serving(make_pair(), auth_tokens=tokens) as live:
        request = pb.CompareRequest(prompt="x", sampling=pb.SamplingParams(max_tokens=2))
        with Client(live.server.address, token=token, max_attempts=1) as client:
            assert failure(lambda: client.compare(request)).code() is CODE.UNAUTHENTICATED
        with Client(live.server.address, token=TOKEN, timeout_s=30) as client:
            assert client.compare(request).samples
        labels = {"rpc": "Compare", "route": "none", "code": "UNAUTHENTICATED", "task": "other"}
        assert live.pair.value("requests_total", **labels) == 1
        assert live.pair.value("admission_rejections_total", reason="unauthenticated") == 1
