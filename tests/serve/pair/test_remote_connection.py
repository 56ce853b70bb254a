"""Which servers are a student's teacher, with which credentials, and what their nonsense costs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from bundle.errors import UserError
from protos.tandem.v1 import inference_pb2 as pb
from serve.addresses import RemoteAddress
from serve.client.channel import Endpoint, Tls
from serve.pair.remote_teacher import teacher_of
from serve.pair.served import Role
from serve.rpc.credentials.tokens import new_token
from tests.support.polling import wait_until
from tests.support.rpc.remote_teachers import (
    CANCELLED,
    NOWHERE,
    SCORE,
    RemoteTeachers,
    check_student_alone,
    is_up,
    reached,
    why_lost,
)

# What is no teacher of this student


def test_other_tokenizer_is_no_teacher(
    remote: RemoteTeachers, serving: Any, make_pair: Any, make_tokenizer: Any
) -> None:
    tokenizers = {Role.TEACHER: make_tokenizer(extra="new")}
    pair = make_pair(roles=(Role.TEACHER,), tokenizers_by_role=tokenizers)
    with serving(pair) as other:
        student = remote.student(other.server.address)
        wait_until(lambda: "mean different texts" in why_lost(student), what="the refusal")
        check_student_alone(student)


def test_other_tokenizer_steers_no_terminal() -> None:
    model = pb.Model(role=pb.ROLE_TEACHER, tokenizer_hash="a\x1b[2J")
    with pytest.raises(UserError) as error:
        teacher_of(pb.GetModelsResponse(models=[model]), "abc")
    assert str(error.value).isprintable()


def test_server_whose_teacher_is_remote_is_no_teacher(remote: RemoteTeachers) -> None:
    middle = reached(remote.student(remote.teacher().server.address))
    student = remote.student(middle.server.address)
    wait_until(lambda: "no teacher of its own" in why_lost(student), what="the refusal")


def test_server_without_a_teacher_is_none(
    remote: RemoteTeachers, serving: Any, make_pair: Any
) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as other:
        student = remote.student(other.server.address)
        wait_until(
            lambda: "NOT_FOUND: no such health name" in why_lost(student), what="the refusal"
        )


def test_token_is_read_again_when_the_teacher_refuses_it(
    remote: RemoteTeachers, tmp_path: Path
) -> None:
    (secret, sha256), (wrong, _) = new_token(), new_token()
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    tokens.write_text(f"student {sha256} inference\n")
    mine.write_text(wrong)
    address = remote.teacher(auth_tokens=tokens).server.address
    target = RemoteAddress.parse(f"grpc://{address}").target
    student = remote.student(address, lambda: Endpoint(target, mine.read_text()))
    wait_until(lambda: "UNAUTHENTICATED" in why_lost(student), what="the refusal")
    mine.write_text(secret)
    reached(student)


def test_certificates_are_read_again_when_the_teacher_cannot_be_reached(
    remote: RemoteTeachers, tmp_path: Path
) -> None:
    old, new = trustme.CA(), trustme.CA()
    cert, key, mine = (tmp_path / name for name in ("cert", "key", "ca"))
    issued = new.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(cert)
    old.cert_pem.write_to_path(mine)
    address = remote.teacher(tls_cert=cert, tls_key=key).server.address
    student = remote.student(address, lambda: Endpoint(address, tls=Tls(mine)))
    wait_until(lambda: "CERTIFICATE_VERIFY_FAILED" in why_lost(student), what="the refusal")
    new.cert_pem.write_to_path(mine)
    reached(student)


def test_calls_on_their_way_outlive_the_credentials_that_they_had(
    remote: RemoteTeachers, loop: asyncio.AbstractEventLoop
) -> None:
    teacher = remote.teacher()
    student = reached(remote.student(teacher.server.address))
    backend = teacher.pair.backends[Role.TEACHER]
    backend.may_run.clear()
    score = student.stub.Score.future(SCORE)
    assert backend.is_asked.wait(10)
    loop.call_soon_threadsafe(student.pair.engines.teacher.engine.reconnect)
    time.sleep(1.2)  # more than the second that they had
    assert student.client.get_models().models[1].backend and is_up(student)
    backend.may_run.set()
    assert len(score.result(10).scores) == 4


def test_credentials_that_cannot_be_read_are_a_reason(remote: RemoteTeachers) -> None:
    student = remote.student(NOWHERE, lambda: Endpoint("x", (Path("/nowhere")).read_text()))
    wait_until(lambda: "No such file" in why_lost(student), what="the reason")


# A server that answers nonsense


@pytest.mark.parametrize(("seed", "code"), [(13, "UNAVAILABLE"), (14, "INTERNAL")])
def test_call_that_the_teacher_cancels_was_not_taken_but_by_an_operator(
    remote: RemoteTeachers, liar: str, seed: int, code: str
) -> None:
    student = reached(remote.student(liar))
    sampling = pb.SamplingParams(seed=seed)
    request = pb.GenerateRequest(prompt="x", route=pb.ROUTE_TEACHER, sampling=sampling)
    with pytest.raises(grpc.RpcError) as caught:
        student.client.generate(request).result()
    assert caught.value.code().name == code
    assert CANCELLED[seed] in caught.value.details()


def test_nonsense_is_an_error_of_the_teacher_alone(remote: RemoteTeachers, liar: str) -> None:
    student = reached(remote.student(liar))
    check_student_alone(student)
    assert student.pair.value("remote_calls_total", rpc="Generate", code="INTERNAL") == 1
    assert student.pair.value("remote_calls_total", rpc="Score", code="INTERNAL") >= 1
