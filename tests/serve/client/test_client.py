from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from protos.tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import (
    AsyncClient,
    Client,
    ControlClient,
    IncompleteStreamError,
    Tls,
    explain,
    violations,
)

CODE = grpc.StatusCode
DOWN = (CODE.UNAVAILABLE, None)
TOKENS = pb.GenerateResponse(tokens=pb.TokenChunk(token_ids=[5]))
COMPLETES = [
    pb.GenerateResponse(complete=pb.Complete(sample=pb.Sample(role=role, index=index)))
    for role, index in ((pb.ROLE_TEACHER, 0), (pb.ROLE_STUDENT, 1), (pb.ROLE_STUDENT, 0))
]
AGREEMENT = pb.GenerateResponse(agreement=pb.Agreement(same_answer=True))
USAGE = pb.GenerateResponse(usage=pb.Usage(seed=7))


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    """Refuses as often as told, each time with a code and a pushback in ms, and then answers."""

    def __init__(
        self,
        refusals: Iterable[tuple[CODE, int | None]] = (),
        events: Iterable[pb.GenerateResponse] = (USAGE,),
    ) -> None:
        self.refusals, self.events = iter(refusals), events
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.is_ended = threading.Event()
        self.target = ""

    def admit(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        metadata = self.metadata = dict(context.invocation_metadata())
        code, pushback_ms = self.verdict(int(metadata.get("grpc-previous-rpc-attempts", "0")))
        if pushback_ms is not None:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(pushback_ms)),))
        if code is not None:
            context.abort(code, "not now")

    def verdict(self, num_before: int) -> tuple[CODE | None, int | None]:
        """Say what to do with a call that was sent so often before."""
        return next(self.refusals, (None, None))

    def Compare(self, request: Any, context: Any) -> pb.CompareResponse:  # noqa: N802
        self.admit(request, context)
        return pb.CompareResponse(samples=[pb.Sample(text=request.prompt)])

    def Score(self, request: Any, context: Any) -> pb.ScoreResponse:  # noqa: N802
        self.admit(request, context)
        return pb.ScoreResponse(scores=[pb.Score(role=pb.ROLE_TEACHER)])

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.admit(request, context)
        context.add_callback(self.is_ended.set)
        yield from self.events


@contextmanager
def serving(
    service: Any, credentials: grpc.ServerCredentials | None = None, add: Any = None
) -> Iterator[Any]:
    server = grpc.server(ThreadPoolExecutor(4))
    (add or inference_pb2_grpc.add_InferenceServiceServicer_to_server)(service, server)
    port = (
        server.add_secure_port("127.0.0.1:0", credentials)
        if credentials
        else server.add_insecure_port("127.0.0.1:0")
    )
    service.target = f"127.0.0.1:{port}"
    server.start()
    try:
        yield service
    finally:
        server.stop(None).wait()


def failure(client: Client) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        client.compare(pb.CompareRequest(prompt="x"))
    return caught.value


# Failures


def test_refused_fields_are_explained(live: Any) -> None:
    request = pb.CompareRequest(prompt="x", sampling=pb.SamplingParams(top_p=2, num_samples=0))
    with pytest.raises(grpc.RpcError) as caught:
        live.client.compare(request)
    assert violations(caught.value) == {
        "sampling.num_samples": "is 0; must be 1 to 64",
        "sampling.top_p": "is 2.0; must be 1e-06 to 1",
    }
    assert explain(caught.value) == (
        "INVALID_ARGUMENT:\n"
        "  sampling.num_samples is 0; must be 1 to 64\n"
        "  sampling.top_p is 2.0; must be 1e-06 to 1"
    )


def test_response_beyond_the_default_of_4_mib_is_received() -> None:
    text = "x" * (3 << 20)
    events = [pb.GenerateResponse(complete=pb.Complete(sample=pb.Sample(text=2 * text))), USAGE]
    with serving(Scripted(events=events)) as service, Client(service.target) as client:
        (sample,) = client.generate(pb.GenerateRequest()).result().samples
    assert len(sample.text) == 6 << 20


# Request ids and retries


def test_request_without_an_id_gets_a_new_one_and_is_left_as_it_was() -> None:
    request = pb.CompareRequest(prompt="x", sampling=pb.SamplingParams(seed=0))
    with serving(Scripted()) as service, Client(service.target) as client:
        client.compare(request)
        client.score(pb.ScoreRequest(prompt="x"))
        client.generate(pb.GenerateRequest(prompt="x")).result()
        client.compare(pb.CompareRequest(request_id="mine"))
    ids = [sent.request_id for sent in service.requests]
    assert ids.pop() == "mine"
    assert {len(each) for each in ids} == {32} and len(set(ids)) == 3
    assert request.request_id == ""
    sent = service.requests[0]
    sent.ClearField("request_id")
    assert sent == request


def test_unavailable_is_retried_with_the_same_id_behind_a_growing_pause() -> None:
    with serving(Scripted([DOWN, DOWN])) as service, Client(service.target) as client:
        started_s = time.monotonic()
        assert client.compare(pb.CompareRequest(prompt="x")).samples[0].text == "x"
        assert time.monotonic() - started_s > 0.4
    assert len(service.requests) == 3
    assert len({sent.request_id for sent in service.requests}) == 1


def test_pushback_of_the_server_is_waited_for() -> None:
    refusals = [(CODE.RESOURCE_EXHAUSTED, 500)]
    with serving(Scripted(refusals)) as service, Client(service.target) as client:
        started_s = time.monotonic()
        client.generate(pb.GenerateRequest(prompt="x")).result()
        assert time.monotonic() - started_s >= 0.5
    assert len(service.requests) == 2


def test_cancel_ends_the_pause_between_two_attempts() -> None:
    an_hour_ms = 3_600_000
    refusals = [(CODE.UNAVAILABLE, an_hour_ms)]
    with serving(Scripted(refusals)) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        timer = threading.Timer(0.5, stream.cancel)
        timer.start()
        with pytest.raises(grpc.RpcError):
            stream.result()
        timer.join()


@pytest.mark.parametrize("code", [CODE.INVALID_ARGUMENT, CODE.OUT_OF_RANGE, CODE.INTERNAL])
def test_other_codes_are_not_retried(code: CODE) -> None:
    with serving(Scripted([(code, None)])) as service, Client(service.target) as client:
        assert failure(client).code() is code
    assert len(service.requests) == 1


def test_timeout_bounds_the_call_with_its_retries() -> None:
    refusals = itertools.repeat((CODE.UNAVAILABLE, 200))
    with serving(Scripted(refusals)) as service, Client(service.target, timeout_s=0.5) as client:
        assert failure(client).code() is CODE.DEADLINE_EXCEEDED
    assert len(service.requests) <= 3  # as many as start within half a second


def test_one_attempt_retries_nothing() -> None:
    with serving(Scripted([DOWN])) as service, Client(service.target, max_attempts=1) as client:
        assert failure(client).code() is CODE.UNAVAILABLE
    assert len(service.requests) == 1


def test_retries_of_a_server_that_refuses_everything_end_with_their_budget() -> None:
    refusals = itertools.repeat((CODE.RESOURCE_EXHAUSTED, 1))
    with serving(Scripted(refusals)) as service, Client(service.target) as client:
        for _ in range(600):
            failure(client)
    assert 600 + 300 <= len(service.requests) <= 600 + 500


class Restarting(Scripted):
    """Refuses every call three times."""

    def verdict(self, num_before: int) -> tuple[CODE | None, int | None]:
        return (CODE.UNAVAILABLE, 1) if num_before < 3 else (None, None)


def test_64_calls_together_outlast_three_failures_each() -> None:
    with (
        serving(Restarting()) as service,
        Client(service.target) as client,
        ThreadPoolExecutor(64) as pool,
    ):
        list(pool.map(client.compare, [pb.CompareRequest(prompt="x")] * 64))
    assert len(service.requests) == 4 * 64


def test_server_that_wants_no_retry_is_left_alone() -> None:
    refusals = itertools.repeat((CODE.RESOURCE_EXHAUSTED, -1))
    with serving(Scripted(refusals)) as service, Client(service.target) as client:
        failure(client)
    assert len(service.requests) == 1


def test_started_stream_is_not_retried() -> None:
    def events() -> Iterator[pb.GenerateResponse]:
        yield TOKENS
        raise RuntimeError("the server broke")

    with serving(Scripted(events=events())) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        assert next(stream) == TOKENS
        with pytest.raises(grpc.RpcError):
            stream.result()
    assert len(service.requests) == 1


# Streams


def test_result_has_samples_in_order_agreement_and_usage() -> None:
    events = [TOKENS, *COMPLETES, AGREEMENT, USAGE]
    with serving(Scripted(events=events)) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        assert next(stream) == TOKENS
        generation = stream.result()
        assert stream.result() == generation
    order = [(sample.role, sample.index) for sample in generation.samples]
    assert order == [(pb.ROLE_STUDENT, 0), (pb.ROLE_STUDENT, 1), (pb.ROLE_TEACHER, 0)]
    assert generation.agreement == AGREEMENT.agreement
    assert generation.usage.seed == 7


def test_stream_without_usage_is_incomplete() -> None:
    with serving(Scripted(events=COMPLETES)) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        with pytest.raises(IncompleteStreamError, match="behind 3 complete samples"):
            stream.result()


def test_stream_left_by_break_is_cancelled_at_the_server() -> None:
    endless = itertools.repeat(TOKENS)
    with serving(Scripted(events=endless)) as service, Client(service.target) as client:
        with client.generate(pb.GenerateRequest(prompt="x")) as stream:
            for _ in stream:
                break
        assert service.is_ended.wait(60)
        with pytest.raises(grpc.RpcError) as caught:
            stream.result()
        assert caught.value.code() is CODE.CANCELLED


@pytest.mark.parametrize("way", ["cancel", "close", "drop"])
def test_stream_given_up_is_cancelled_at_the_server(way: str) -> None:
    endless = itertools.repeat(TOKENS)
    with serving(Scripted(events=endless)) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        next(stream)
        assert not service.is_ended.is_set()
        if way == "drop":
            del stream
        else:
            getattr(stream, way)()
        assert service.is_ended.wait(60)


# TLS and the token


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def pem(folder: Path, name: str, blob: trustme.Blob) -> Path:
    path = folder / f"{name}.pem"
    blob.write_to_path(str(path))
    return path


def server_credentials(authority: trustme.CA, name: str) -> grpc.ServerCredentials:
    certificate = authority.issue_cert(name)
    pair = (
        certificate.private_key_pem.bytes(),
        b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
    )
    return grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), True)


def test_token_travels_over_mutual_tls(authority: trustme.CA, tmp_path: Path) -> None:
    own = authority.issue_cert("client.test")
    tls = Tls(
        pem(tmp_path, "ca", authority.cert_pem),
        pem(tmp_path, "cert", own.cert_chain_pems[0]),
        pem(tmp_path, "key", own.private_key_pem),
        server_name="tandem.test",
    )
    credentials = server_credentials(authority, "tandem.test")
    with (
        serving(Scripted(), credentials) as service,
        Client(service.target, token="secret", tls=tls) as client,
    ):
        client.compare(pb.CompareRequest(prompt="x"))
    assert service.metadata["authorization"] == "Bearer secret"


def test_server_of_another_authority_is_not_trusted(authority: trustme.CA, tmp_path: Path) -> None:
    tls = Tls(ca=pem(tmp_path, "other", trustme.CA().cert_pem))
    with (
        serving(Scripted(), server_credentials(authority, "127.0.0.1")) as service,
        Client(service.target, tls=tls, max_attempts=1) as client,
    ):
        assert failure(client).code() is CODE.UNAVAILABLE
    assert service.requests == []


def test_token_travels_in_clear_to_this_machine_alone() -> None:
    with serving(Scripted()) as service, Client(service.target, token="secret") as client:
        client.compare(pb.CompareRequest(prompt="x"))
    assert service.metadata["authorization"] == "Bearer secret"
    with pytest.raises(ValueError, match="in clear"):
        Client("example.com:50051", token="secret")


def test_this_machine_is_not_asked_for_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving(Scripted()) as service, Client(service.target, max_attempts=1) as client:
        client.compare(pb.CompareRequest(prompt="x"))


# Asyncio


def on(loop: asyncio.AbstractEventLoop, coroutine: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)


def test_async_client_retries_identifies_and_authenticates(
    loop: asyncio.AbstractEventLoop,
) -> None:
    async def ask(target: str) -> Any:
        async with AsyncClient(target, timeout_s=10, token="secret") as client:
            compared = await client.compare(pb.CompareRequest(prompt="x"))
            scored = await client.score(pb.ScoreRequest(prompt="x", request_id="mine"))
            with pytest.raises(grpc.RpcError) as caught:
                await client.get_models()
            return compared, scored, caught.value

    with serving(Scripted([(CODE.UNAVAILABLE, 1)] * 2)) as service:
        compared, scored, error = on(loop, ask(service.target))
    assert (compared.samples[0].text, scored.scores[0].role) == ("x", pb.ROLE_TEACHER)
    assert explain(error).startswith("UNIMPLEMENTED: ")
    first, *_, last = ids = [sent.request_id for sent in service.requests]
    assert ids == [first] * 3 + ["mine"] and len(first) == 32 and last == "mine"
    assert service.metadata["authorization"] == "Bearer secret"


def test_async_stream_has_events_and_a_result(loop: asyncio.AbstractEventLoop) -> None:
    async def ask(target: str) -> Any:
        async with AsyncClient(target) as client:
            stream = client.generate(pb.GenerateRequest(prompt="x"))
            first = await anext(stream)
            return first, await stream.result()

    with serving(Scripted(events=[TOKENS, *COMPLETES, USAGE])) as service:
        first, generation = on(loop, ask(service.target))
        assert first == TOKENS
        assert (len(generation.samples), generation.agreement) == (3, None)
        service.events = [TOKENS]
        with pytest.raises(IncompleteStreamError):
            on(loop, ask(service.target))


@pytest.mark.parametrize("way", ["with", "drop", "task"])
def test_async_stream_left_half_way_is_cancelled_at_the_server(
    way: str, loop: asyncio.AbstractEventLoop
) -> None:
    async def leave(target: str) -> bool:
        async with AsyncClient(target) as client:
            stream = client.generate(pb.GenerateRequest(prompt="x"))
            if way == "with":
                async with stream:
                    async for _ in stream:
                        break
            elif way == "drop":
                await anext(stream)
                del stream
            else:
                task = asyncio.create_task(stream.result())
                await asyncio.wait([task], timeout=0.05)
                task.cancel()
            # While the channel is open: closing it would cancel whatever is left.
            return await asyncio.to_thread(service.is_ended.wait, 5)

    with serving(Scripted(events=itertools.repeat(TOKENS))) as service:
        assert on(loop, leave(service.target))


# The control plane


class Control(control_pb2_grpc.ControlServiceServicer):
    """Knows one policy and one running request; refuses `num_refusals` calls first."""

    def __init__(self, num_refusals: int = 0) -> None:
        self.num_refusals = num_refusals
        self.calls: list[Any] = []
        self.target = ""

    def _admit(self, request: Any, context: Any) -> None:
        self.calls.append(request)
        if len(self.calls) <= self.num_refusals:
            context.abort(CODE.UNAVAILABLE, "not now")

    def GetStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._admit(request, context)
        return control_pb2.GetStatusResponse(version="1", num_requests=2)

    def GetPolicy(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._admit(request, context)
        return control_pb2.GetPolicyResponse(policy=control_pb2.Policy(student_weight=1))

    def SetPolicy(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._admit(request, context)
        return control_pb2.SetPolicyResponse(policy=control_pb2.Policy(revision=2))

    def Drain(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._admit(request, context)
        return control_pb2.DrainResponse()

    def Abort(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._admit(request, context)
        if request.request_id != "mine":
            context.abort(CODE.NOT_FOUND, "no such request runs")
        return control_pb2.AbortResponse()


ADD_CONTROL = control_pb2_grpc.add_ControlServiceServicer_to_server


def test_control_client_calls_every_method() -> None:
    with serving(Control(), add=ADD_CONTROL) as service, ControlClient(service.target) as control:
        assert control.status().num_requests == 2
        assert control.policy().student_weight == 1
        assert control.set_policy(shadow_rate=0.0, expected_revision=1).revision == 2
        control.drain()
        control.abort("mine")
        with pytest.raises(grpc.RpcError, match="no such request"):
            control.abort("other")
    assert service.calls[2] == control_pb2.SetPolicyRequest(shadow_rate=0.0, expected_revision=1)
    assert isinstance(service.calls[3], control_pb2.DrainRequest)


def test_control_call_that_reads_is_repeated() -> None:
    with serving(Control(1), add=ADD_CONTROL) as service, ControlClient(service.target) as control:
        assert control.status().version == "1"
    assert len(service.calls) == 2


def test_control_call_that_changes_is_not_repeated() -> None:
    with serving(Control(1), add=ADD_CONTROL) as service, ControlClient(service.target) as control:
        with pytest.raises(grpc.RpcError, match="not now"):
            control.drain()
        assert len(service.calls) == 1
