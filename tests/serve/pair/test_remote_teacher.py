"""A student's server whose teacher is another server: real servers, real channels."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from bundle.errors import UserError
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import explain
from serve.client.channel import Endpoint, Tls
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import FinishReason, GenerationRequest
from serve.pair.remote_address import RemoteAddress
from serve.pair.remote_teacher import RemoteTeacher, teacher_of
from serve.pair.served import Engines, Role, ServedModel
from serve.rpc.credentials.tokens import new_token
from serve.sampling.params import SamplingParams

SAMPLING = pb.SamplingParams(num_samples=3, seed=5, max_tokens=12)
NOWHERE = "127.0.0.1:1"
CANCELLED = {13: "as a server that closes", 14: "the request was aborted by an operator"}
"""By seed: what a server says of a call that it cancels."""


class Elsewhere:
    """Starts teachers alone, and students whose teacher is at an address."""

    def __init__(self, serving: Any, make_pair: Any, tokenizer: Any, stack: ExitStack) -> None:
        self._serving, self._make_pair, self._stack = serving, make_pair, stack
        self._tokenizer = tokenizer
        self.logits = make_pair().backends[Role.TEACHER].logits

    def teacher(self, **settings: Any) -> Any:
        pair = self._make_pair(teacher=self.logits, roles=(Role.TEACHER,))
        return self._stack.enter_context(self._serving(pair, **settings))

    @contextmanager
    def passing_teacher(self, **settings: Any) -> Iterator[Any]:
        pair = self._make_pair(teacher=self.logits, roles=(Role.TEACHER,))
        with self._serving(pair, **settings) as live:
            yield live

    def student(
        self, address: str, open_endpoint: Callable[[], Endpoint] | None = None, **settings: Any
    ) -> Any:
        pair = self._make_pair(roles=(Role.STUDENT,))
        target = RemoteAddress.parse(f"grpc://{address}").target
        engine = RemoteTeacher(
            f"grpc://{address}",
            open_endpoint or (lambda: Endpoint(target, max_attempts=2)),
            tokenizer_hash=self._tokenizer.hash,
            scoring_timeout_s=20,
            on_call=lambda rpc, code: pair.metrics.remote_calls.labels(rpc, code).inc(),
            probe_period_s=0.05,
        )
        teacher = ServedModel(Role.TEACHER, engine, self._tokenizer, address=f"grpc://{address}")
        pair.engines = Engines(pair.engines.student, teacher)
        return self._stack.enter_context(self._serving(pair, **settings))


@pytest.fixture
def elsewhere(serving: Any, make_pair: Any, tokenizer: Any) -> Iterator[Elsewhere]:
    with ExitStack() as stack:
        yield Elsewhere(serving, make_pair, tokenizer, stack)


def eventually(holds: Callable[[], bool], what: str) -> None:
    for _ in range(400):
        if holds():
            return
        time.sleep(0.025)
    pytest.fail(f"{what} did not come about within 10 s")


def is_up(live: Any) -> bool:
    return bool(live.pair.value("model_up", role="teacher"))


def reached(live: Any) -> Any:
    eventually(lambda: is_up(live), "the connection to the teacher")
    return live


def timeless(response: Any) -> Any:
    """Return a response without what differs between two runs of the same request."""
    copy = type(response)()
    copy.CopyFrom(response)
    copy.usage.ClearField("seconds")
    for sample in getattr(copy, "samples", ()):
        sample.ClearField("timings")
    return copy


# The same answers as with a teacher in this process


COMPARE = pb.CompareRequest(
    request_id="c",
    prompt="1 + 1 = ",
    sampling=pb.SamplingParams(
        num_samples=3, seed=5, max_tokens=12, temperature=0.8, top_p=0.95, stop=["7"],
        repetition_penalty=1.05,
    ),
    divergence=pb.DivergenceOptions(per_token=True),
    evaluation=pb.EvaluationOptions(answer_format="last_number", pass_at_k=[1]),
    output=pb.OutputOptions(top_logprobs=2, processed_logprobs=True),
)  # fmt: skip
SCORE = pb.ScoreRequest(
    prompt="1 + 1 = ",
    request_id="s",
    temperature=0.7,
    completions=[pb.Completion(text="2"), pb.Completion(text="11 and more")],
)


def test_answers_are_those_of_a_teacher_here(
    elsewhere: Elsewhere, serving: Any, make_pair: Any
) -> None:
    student = reached(elsewhere.student(elsewhere.teacher().server.address))
    with serving(make_pair()) as here:
        compared = [timeless(live.client.compare(COMPARE)) for live in (here, student)]
        scored = [timeless(live.client.score(SCORE)) for live in (here, student)]
    assert compared[0] == compared[1] and scored[0] == scored[1]
    assert all(sample.divergence.num_tokens for sample in compared[1].samples)


def test_stream_of_the_teacher_is_that_of_a_teacher_here(
    elsewhere: Elsewhere, serving: Any, make_pair: Any
) -> None:
    request = pb.GenerateRequest(
        prompt="2 + 2 = ", request_id="g", route=pb.ROUTE_TEACHER, sampling=SAMPLING
    )
    student = reached(elsewhere.student(elsewhere.teacher().server.address))
    with serving(make_pair()) as here:
        streams = [list(live.client.generate(request)) for live in (here, student)]
    texts = [
        ["".join(e.tokens.text for e in events if e.tokens.index == i) for i in range(3)]
        for events in streams
    ]
    assert texts[0] == texts[1]
    assert sum(len(e.tokens.token_ids) for e in streams[1]) > 3
    usages = [events[-1].usage.roles[0] for events in streams]
    assert usages[0] == usages[1]


def test_models_say_what_is_elsewhere(elsewhere: Elsewhere) -> None:
    teacher = elsewhere.teacher()
    student = reached(elsewhere.student(teacher.server.address))
    first, second = student.client.get_models().models
    assert (first.role, first.address) == (pb.ROLE_STUDENT, "")
    assert (second.role, second.address) == (pb.ROLE_TEACHER, f"grpc://{teacher.server.address}")
    assert second.backend == "fake" and second.max_num_seqs == 8 and second.batch_invariant


def test_calls_of_the_teacher_are_counted(elsewhere: Elsewhere) -> None:
    student = reached(elsewhere.student(elsewhere.teacher().server.address))
    student.client.compare(COMPARE)
    assert student.pair.value("remote_calls_total", rpc="Generate", code="OK") == 1
    assert student.pair.value("remote_calls_total", rpc="Score", code="OK") == 1


def test_series_of_a_teacher_elsewhere_are_there_from_the_start(elsewhere: Elsewhere) -> None:
    """What its calls may end with; of divergences all but those that need its logits."""
    registry = elsewhere.student(NOWHERE).pair.metrics.registry
    labels = [(s.name, s.labels) for family in registry.collect() for s in family.samples]
    codes = {of["code"] for name, of in labels if name == "tandem_remote_calls_total"}
    assert codes == {code.name for code in grpc.StatusCode}
    assert {of["estimator"] for _, of in labels if "estimator" in of} == {"k1", "k2", "k3"}
    assert "tandem_compared_tokens_total" not in {name for name, _ in labels}


@pytest.mark.parametrize("rpc", ["compare", "score"])
def test_exact_divergence_is_refused(elsewhere: Elsewhere, rpc: str) -> None:
    student = elsewhere.student(NOWHERE)
    request = {"compare": pb.CompareRequest, "score": pb.ScoreRequest}[rpc]()
    request.CopyFrom({"compare": COMPARE, "score": SCORE}[rpc])
    request.divergence.exact = True
    with pytest.raises(grpc.RpcError) as caught:
        getattr(student.client, rpc)(request)
    assert "FAILED_PRECONDITION: the teacher is at grpc://127.0.0.1:1" in explain(caught.value)


# A lost teacher costs the teacher's part alone


def check_student_alone(live: Any) -> None:
    """Check that what needs no teacher has no error, and what needs it says so."""
    (sample,) = (
        live.client.generate(pb.GenerateRequest(prompt="x", sampling={"seed": 1})).result().samples
    )
    assert sample.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
    assert "the teacher" in sample.divergence_error and not sample.HasField("divergence")
    both = live.client.compare(pb.CompareRequest(prompt="x", sampling=SAMPLING)).samples
    assert [s.finish_reason == pb.FINISH_REASON_ERROR for s in both] == [False] * 3 + [True] * 3
    assert all("the teacher" in sample.error for sample in both[3:])


def test_teacher_that_was_never_there_leaves_the_student(elsewhere: Elsewhere) -> None:
    student = elsewhere.student(NOWHERE)
    check_student_alone(student)
    assert student.server.is_healthy()
    health = health_pb2_grpc.HealthStub(student.channel)
    statuses = [
        health.Check(health_pb2.HealthCheckRequest(service=name)).status
        for name in ("", "readiness", "model.student", "model.teacher")
    ]
    assert statuses == [health_pb2.HealthCheckResponse.SERVING] * 3 + [
        health_pb2.HealthCheckResponse.NOT_SERVING
    ]
    assert [m.role for m in student.client.get_models().models] == [1, 2]


def test_route_to_a_lost_teacher_is_unavailable(elsewhere: Elsewhere) -> None:
    student = elsewhere.student(NOWHERE)
    with pytest.raises(grpc.RpcError) as caught:
        student.client.generate(pb.GenerateRequest(prompt="x", route=pb.ROUTE_TEACHER)).result()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the teacher at grpc://127.0.0.1:1 is lost" in caught.value.details()


def test_policy_for_a_lost_teacher_means_the_student(elsewhere: Elsewhere) -> None:
    student = elsewhere.student(NOWHERE, student_weight=0, teacher_weight=1)
    (sample,) = student.client.generate(pb.GenerateRequest(prompt="x")).result().samples
    assert sample.role == pb.ROLE_STUDENT
    teacher = elsewhere.teacher()
    student = reached(elsewhere.student(teacher.server.address, student_weight=0, teacher_weight=1))
    (sample,) = student.client.generate(pb.GenerateRequest(prompt="x")).result().samples
    assert sample.role == pb.ROLE_TEACHER


def test_teacher_that_ends_is_lost_and_found_again(elsewhere: Elsewhere) -> None:
    with elsewhere.passing_teacher() as teacher:
        port = int(teacher.server.address.rpartition(":")[2])
        student = reached(elsewhere.student(teacher.server.address))
    eventually(lambda: not is_up(student), "the loss")
    check_student_alone(student)
    elsewhere.teacher(port=port)
    reached(student)
    assert all(s.HasField("divergence") for s in student.client.compare(COMPARE).samples)


def test_calls_on_their_way_end_with_the_teacher(elsewhere: Elsewhere) -> None:
    with elsewhere.passing_teacher(drain_grace_s=0) as teacher:
        student = reached(elsewhere.student(teacher.server.address))
        teacher.pair.backends[Role.TEACHER].may_run.clear()
        sampling = pb.SamplingParams(num_samples=3, max_tokens=50, ignore_eos=True)
        answer = student.stub.Compare.future(pb.CompareRequest(prompt="x", sampling=sampling))
        assert teacher.pair.backends[Role.TEACHER].is_asked.wait(10)
        ended = teacher.stop_soon()
        eventually(lambda: not teacher.pair.engines.teacher.is_alive, "the stop of its engine")
        teacher.pair.backends[Role.TEACHER].may_run.set()
        samples = answer.result(20).samples
        ended.result(20)
    assert all(not sample.error for sample in samples[:3])
    assert {s.finish_reason for s in samples[3:]} <= {
        pb.FINISH_REASON_SHUTDOWN,
        pb.FINISH_REASON_ERROR,
    }


@pytest.mark.parametrize(
    ("is_streamed", "role"), [(False, pb.ROLE_STUDENT), (True, pb.ROLE_TEACHER)]
)
def test_student_answers_what_the_policy_gave_a_teacher_that_is_lost_meanwhile(
    elsewhere: Elsewhere, is_streamed: bool, role: pb.Role
) -> None:
    """Unless the client has seen tokens of the teacher: then the answer ends with SHUTDOWN."""
    with elsewhere.passing_teacher(drain_grace_s=0) as teacher:
        address = teacher.server.address
        student = reached(elsewhere.student(address, student_weight=0, teacher_weight=1))
        request = pb.GenerateRequest(
            prompt="x",
            sampling=pb.SamplingParams(num_samples=4, max_tokens=200, ignore_eos=True),
            output=pb.OutputOptions(stream=is_streamed),
        )
        backend = teacher.pair.backends[Role.TEACHER]
        backend.hold_after = 20
        stream = student.client.generate(request)
        assert backend.is_held.wait(10)
        ended = teacher.stop_soon()
        eventually(lambda: not teacher.pair.engines.teacher.is_alive, "the stop of its engine")
        backend.may_run.set()
        samples = stream.result().samples
        ended.result(20)
    assert {sample.role for sample in samples} == {role}
    is_whole = [sample.finish_reason == pb.FINISH_REASON_LENGTH for sample in samples]
    assert is_whole == [not is_streamed] * 4


def test_teacher_that_hangs_does_not_cost_the_deadline(elsewhere: Elsewhere) -> None:
    teacher = elsewhere.teacher()
    student = reached(elsewhere.student(teacher.server.address))
    teacher.pair.backends[Role.TEACHER].may_run.clear()
    request = pb.GenerateRequest(prompt="x", route=pb.ROUTE_STUDENT)
    (sample,) = student.client.generate(request, timeout_s=2).result().samples
    assert "deadline passed" in sample.divergence_error
    samples = student.client.compare(pb.CompareRequest(prompt="x"), timeout_s=2).samples
    assert [sample.finish_reason for sample in samples][1:] == [pb.FINISH_REASON_DEADLINE]


def test_cancelled_request_leaves_the_teacher_idle(elsewhere: Elsewhere) -> None:
    teacher = elsewhere.teacher()
    student = reached(elsewhere.student(teacher.server.address))
    backend = teacher.pair.backends[Role.TEACHER]
    backend.may_run.clear()
    call = student.stub.Generate(pb.GenerateRequest(prompt="x", route=pb.ROUTE_TEACHER))
    assert backend.is_asked.wait(10)
    call.cancel()
    backend.may_run.set()
    engine = teacher.pair.engines.teacher.engine
    eventually(lambda: engine.load().num_running + engine.load().num_waiting == 0, "idleness")
    eventually(
        lambda: student.pair.value("remote_calls_total", rpc="Generate", code="CANCELLED") == 1,
        "the count",
    )


def test_call_that_is_cancelled_at_once_has_its_end(
    elsewhere: Elsewhere, loop: asyncio.AbstractEventLoop
) -> None:
    student = reached(elsewhere.student(elsewhere.teacher().server.address))
    engine, events = student.pair.engines.teacher.engine, []

    async def begin_and_cancel() -> Any:
        engine.submit(GenerationRequest("r", (1,), SamplingParams(num_samples=2)), events.extend)
        scores = engine.score(ScoringRequest("r", (1,), ((2,),)))
        engine.cancel("r")
        return scores

    scores = asyncio.run_coroutine_threadsafe(begin_and_cancel(), loop).result(10)
    with pytest.raises(CancelledError):
        scores.result(10)
    eventually(lambda: engine.load().num_running == 0, "the end")
    assert [event.finish_reason for event in events] == [FinishReason.CANCELLED] * 2


def test_drain_of_the_student_ends_calls_of_the_teacher(elsewhere: Elsewhere) -> None:
    teacher = elsewhere.teacher()
    student = reached(elsewhere.student(teacher.server.address, drain_grace_s=0))
    backend = teacher.pair.backends[Role.TEACHER]
    backend.may_run.clear()
    answer = student.stub.Compare.future(COMPARE)
    assert backend.is_asked.wait(10)
    student.stop_soon().result(20)
    assert answer.exception(20) is not None or all(s.error for s in answer.result().samples[3:])


def test_more_than_the_teacher_takes_is_no_error_of_the_student(
    elsewhere: Elsewhere, serving: Any, make_pair: Any
) -> None:
    pair = make_pair(teacher=elsewhere.logits, roles=(Role.TEACHER,), max_model_len=16)
    with serving(pair) as small:
        student = reached(elsewhere.student(small.server.address))
        samples = student.client.compare(pb.CompareRequest(prompt="x" * 20)).samples
    assert not samples[0].error and "OUT_OF_RANGE" in samples[0].divergence_error
    assert "the context takes 16" in samples[1].error


def test_default_max_tokens_fits_the_shorter_context_of_the_teacher(
    elsewhere: Elsewhere, serving: Any, make_pair: Any
) -> None:
    pair = make_pair(teacher=elsewhere.logits, roles=(Role.TEACHER,), max_model_len=16)
    sampling = pb.SamplingParams(ignore_eos=True)
    with serving(pair) as small:
        student = reached(elsewhere.student(small.server.address))
        request = pb.CompareRequest(prompt="x" * 10, sampling=sampling)
        samples = student.client.compare(request).samples
    assert [len(sample.token_ids) for sample in samples] == [6, 6]
    assert all(sample.HasField("divergence") for sample in samples)


# What is no teacher of this student


def why_lost(live: Any) -> str:
    return live.pair.engines.teacher.engine._why_lost


def test_other_tokenizer_is_no_teacher(
    elsewhere: Elsewhere, serving: Any, make_pair: Any, make_tokenizer: Any
) -> None:
    tokenizers = {Role.TEACHER: make_tokenizer(extra="new")}
    pair = make_pair(roles=(Role.TEACHER,), tokenizers_by_role=tokenizers)
    with serving(pair) as other:
        student = elsewhere.student(other.server.address)
        eventually(lambda: "mean different texts" in why_lost(student), "the refusal")
        check_student_alone(student)


def test_other_tokenizer_steers_no_terminal() -> None:
    model = pb.Model(role=pb.ROLE_TEACHER, tokenizer_hash="a\x1b[2J")
    with pytest.raises(UserError) as error:
        teacher_of(pb.GetModelsResponse(models=[model]), "abc")
    assert str(error.value).isprintable()


def test_server_whose_teacher_is_elsewhere_is_no_teacher(elsewhere: Elsewhere) -> None:
    middle = reached(elsewhere.student(elsewhere.teacher().server.address))
    student = elsewhere.student(middle.server.address)
    eventually(lambda: "no teacher of its own" in why_lost(student), "the refusal")


def test_server_without_a_teacher_is_none(
    elsewhere: Elsewhere, serving: Any, make_pair: Any
) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as other:
        student = elsewhere.student(other.server.address)
        eventually(lambda: "NOT_FOUND: no such health name" in why_lost(student), "the refusal")


def test_token_is_read_again_when_the_teacher_refuses_it(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    (secret, sha256), (wrong, _) = new_token(), new_token()
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    tokens.write_text(f"student {sha256} inference\n")
    mine.write_text(wrong)
    address = elsewhere.teacher(auth_tokens=tokens).server.address
    target = RemoteAddress.parse(f"grpc://{address}").target
    student = elsewhere.student(address, lambda: Endpoint(target, mine.read_text()))
    eventually(lambda: "UNAUTHENTICATED" in why_lost(student), "the refusal")
    mine.write_text(secret)
    reached(student)


def test_certificates_are_read_again_when_the_teacher_cannot_be_reached(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    old, new = trustme.CA(), trustme.CA()
    cert, key, mine = (tmp_path / name for name in ("cert", "key", "ca"))
    issued = new.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(cert)
    old.cert_pem.write_to_path(mine)
    address = elsewhere.teacher(tls_cert=cert, tls_key=key).server.address
    student = elsewhere.student(address, lambda: Endpoint(address, tls=Tls(mine)))
    eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in why_lost(student), "the refusal")
    new.cert_pem.write_to_path(mine)
    reached(student)


def test_calls_on_their_way_outlive_the_credentials_that_they_had(
    elsewhere: Elsewhere, loop: asyncio.AbstractEventLoop
) -> None:
    teacher = elsewhere.teacher()
    student = reached(elsewhere.student(teacher.server.address))
    backend = teacher.pair.backends[Role.TEACHER]
    backend.may_run.clear()
    score = student.stub.Score.future(SCORE)
    assert backend.is_asked.wait(10)
    loop.call_soon_threadsafe(student.pair.engines.teacher.engine._give_up_channel)
    time.sleep(1.2)  # more than the second that they had
    assert student.client.get_models().models[1].backend and is_up(student)
    backend.may_run.set()
    assert len(score.result(10).scores) == 4


def test_credentials_that_cannot_be_read_are_a_reason(elsewhere: Elsewhere) -> None:
    student = elsewhere.student(NOWHERE, lambda: Endpoint("x", (Path("/nowhere")).read_text()))
    eventually(lambda: "No such file" in why_lost(student), "the reason")


# A server that answers nonsense


@pytest.fixture
def liar(loop: asyncio.AbstractEventLoop, tokenizer: Any) -> Iterator[str]:
    """The address of a server whose answers fit no request."""

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        model = pb.Model(role=pb.ROLE_TEACHER, tokenizer_hash=tokenizer.hash)

        async def models(request: Any, context: Any) -> Any:
            return pb.GetModelsResponse(models=[model])

        async def score(request: Any, context: Any) -> Any:
            return pb.ScoreResponse()

        async def generate(request: Any, context: Any) -> Any:
            if text := CANCELLED.get(request.sampling.seed):
                await context.abort(grpc.StatusCode.CANCELLED, text)
            yield pb.GenerateResponse(tokens=pb.TokenChunk(index=9, token_ids=[1], logprobs=[0.0]))

        async def check(request: Any, context: Any) -> Any:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

        def unary(method: Any, kind: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                method, kind.FromString, lambda message: message.SerializeToString()
            )

        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "tandem.v1.InferenceService",
                    {
                        "GetModels": unary(models, pb.GetModelsRequest),
                        "Score": unary(score, pb.ScoreRequest),
                        "Generate": grpc.unary_stream_rpc_method_handler(
                            generate,
                            pb.GenerateRequest.FromString,
                            lambda message: message.SerializeToString(),
                        ),
                    },
                ),
                grpc.method_handlers_generic_handler(
                    "grpc.health.v1.Health", {"Check": unary(check, health_pb2.HealthCheckRequest)}
                ),
            )
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield f"127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)


@pytest.mark.parametrize(("seed", "code"), [(13, "UNAVAILABLE"), (14, "INTERNAL")])
def test_call_that_the_teacher_cancels_was_not_taken_but_by_an_operator(
    elsewhere: Elsewhere, liar: str, seed: int, code: str
) -> None:
    student = reached(elsewhere.student(liar))
    sampling = pb.SamplingParams(seed=seed)
    request = pb.GenerateRequest(prompt="x", route=pb.ROUTE_TEACHER, sampling=sampling)
    with pytest.raises(grpc.RpcError) as caught:
        student.client.generate(request).result()
    assert caught.value.code().name == code
    assert CANCELLED[seed] in caught.value.details()


def test_nonsense_is_an_error_of_the_teacher_alone(elsewhere: Elsewhere, liar: str) -> None:
    student = reached(elsewhere.student(liar))
    check_student_alone(student)
    assert student.pair.value("remote_calls_total", rpc="Generate", code="INTERNAL") == 1
    assert student.pair.value("remote_calls_total", rpc="Score", code="INTERNAL") >= 1
