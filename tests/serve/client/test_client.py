from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient, Client, IncompleteStreamError, Tls, explain, violations
from tests.support.rpc.authorities import Pki
from tests.support.rpc.calls import failure
from tests.support.rpc.scripted import USAGE, Scripted, serving_script

CODE = grpc.StatusCode
TOKENS = pb.GenerateResponse(tokens=pb.TokenChunk(token_ids=[5]))
COMPLETES = [
    pb.GenerateResponse(complete=pb.Complete(sample=pb.Sample(role=role, index=index)))
    for role, index in ((pb.ROLE_TEACHER, 0), (pb.ROLE_STUDENT, 1), (pb.ROLE_STUDENT, 0))
]
AGREEMENT = pb.GenerateResponse(agreement=pb.Agreement(same_answer=True))


def refusal(client: Client) -> Any:
    return failure(lambda: client.compare(pb.CompareRequest(prompt="x")))


# Failures


def test_refused_fields_are_explained(live: Any) -> None:
    request = pb.CompareRequest(prompt="x", sampling=pb.SamplingParams(top_p=2, num_samples=0))
    error = failure(lambda: live.client.compare(request))
    assert violations(error) == {
        "sampling.num_samples": "is 0; must be 1 to 64",
        "sampling.top_p": "is 2.0; must be 1e-06 to 1",
    }
    assert explain(error) == (
        "INVALID_ARGUMENT:\n"
        "  sampling.num_samples is 0; must be 1 to 64\n"
        "  sampling.top_p is 2.0; must be 1e-06 to 1"
    )


def test_response_beyond_the_default_of_4_mib_is_received() -> None:
    text = "x" * (3 << 20)
    events = [pb.GenerateResponse(complete=pb.Complete(sample=pb.Sample(text=2 * text))), USAGE]
    with serving_script(Scripted(events=events)) as service, Client(service.target) as client:
        (sample,) = client.generate(pb.GenerateRequest()).result().samples
    assert len(sample.text) == 6 << 20


# Request ids and retries


def test_request_without_an_id_gets_a_new_one_and_is_left_as_it_was() -> None:
    request = pb.CompareRequest(prompt="x", sampling=pb.SamplingParams(seed=0))
    with serving_script(Scripted()) as service, Client(service.target) as client:
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


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.compare(pb.CompareRequest(prompt="x")),
        lambda client: client.generate(pb.GenerateRequest(prompt="x")).result(),
    ],
)
def test_unavailable_is_retried_with_the_same_id(call: Callable[[Client], Any]) -> None:
    refusals = [(CODE.UNAVAILABLE, None), (CODE.RESOURCE_EXHAUSTED, 1)]
    with serving_script(Scripted(refusals)) as service, Client(service.target) as client:
        call(client)
    assert len(service.requests) == 3
    assert len({sent.request_id for sent in service.requests}) == 1


def test_other_codes_are_not_retried() -> None:
    refusals = [(CODE.INTERNAL, None)]
    with serving_script(Scripted(refusals)) as service, Client(service.target) as client:
        assert refusal(client).code() is CODE.INTERNAL
    assert len(service.requests) == 1


def test_cancel_ends_the_pause_between_two_attempts() -> None:
    an_hour_ms = 3_600_000
    refusals = [(CODE.UNAVAILABLE, an_hour_ms)]
    with serving_script(Scripted(refusals)) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        timer = threading.Timer(0.5, stream.cancel)
        timer.start()
        failure(stream.result)
        timer.join()


def test_timeout_bounds_the_call_with_its_retries() -> None:
    refusals = itertools.repeat((CODE.UNAVAILABLE, 200))
    with (
        serving_script(Scripted(refusals)) as service,
        Client(service.target, timeout_s=0.5) as client,
    ):
        assert refusal(client).code() is CODE.DEADLINE_EXCEEDED
    assert len(service.requests) <= 3  # as many as start within half a second


def test_one_attempt_retries_nothing() -> None:
    with (
        serving_script(Scripted([(CODE.UNAVAILABLE, None)])) as service,
        Client(service.target, max_attempts=1) as client,
    ):
        assert refusal(client).code() is CODE.UNAVAILABLE
    assert len(service.requests) == 1


def test_retries_of_a_server_that_refuses_everything_end_with_their_budget() -> None:
    refusals = itertools.repeat((CODE.RESOURCE_EXHAUSTED, 1))
    with serving_script(Scripted(refusals)) as service, Client(service.target) as client:
        for _ in range(600):
            refusal(client)
    assert 600 + 300 <= len(service.requests) <= 600 + 500


class Restarting(Scripted):
    """Refuses every call three times."""

    def verdict(self, num_before: int) -> tuple[CODE | None, int | None]:
        return (CODE.UNAVAILABLE, 1) if num_before < 3 else (None, None)


def test_64_calls_together_outlast_three_failures_each() -> None:
    with (
        serving_script(Restarting()) as service,
        Client(service.target) as client,
        ThreadPoolExecutor(64) as pool,
    ):
        list(pool.map(client.compare, [pb.CompareRequest(prompt="x")] * 64))
    assert len(service.requests) == 4 * 64


def test_server_that_wants_no_retry_is_left_alone() -> None:
    refusals = itertools.repeat((CODE.RESOURCE_EXHAUSTED, -1))
    with serving_script(Scripted(refusals)) as service, Client(service.target) as client:
        refusal(client)
    assert len(service.requests) == 1


def test_started_stream_is_not_retried() -> None:
    def events() -> Iterator[pb.GenerateResponse]:
        yield TOKENS
        raise RuntimeError("the server broke")

    with serving_script(Scripted(events=events())) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        assert next(stream) == TOKENS
        failure(stream.result)
    assert len(service.requests) == 1


# Streams


def test_result_has_samples_in_order_agreement_and_usage() -> None:
    events = [TOKENS, *COMPLETES, AGREEMENT, USAGE]
    with serving_script(Scripted(events=events)) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        assert next(stream) == TOKENS
        generation = stream.result()
        assert stream.result() == generation
    order = [(sample.role, sample.index) for sample in generation.samples]
    assert order == [(pb.ROLE_STUDENT, 0), (pb.ROLE_STUDENT, 1), (pb.ROLE_TEACHER, 0)]
    assert generation.agreement == AGREEMENT.agreement
    assert generation.usage.seed == 7


def test_stream_without_usage_is_incomplete() -> None:
    with serving_script(Scripted(events=COMPLETES)) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        with pytest.raises(IncompleteStreamError, match="behind 3 complete samples"):
            stream.result()


def test_stream_left_by_break_is_cancelled_at_the_server() -> None:
    endless = itertools.repeat(TOKENS)
    with serving_script(Scripted(events=endless)) as service, Client(service.target) as client:
        with client.generate(pb.GenerateRequest(prompt="x")) as stream:
            for _ in stream:
                break
        assert service.is_ended.wait(60)
        assert failure(stream.result).code() is CODE.CANCELLED


@pytest.mark.parametrize("way", ["cancel", "close", "drop"])
def test_stream_given_up_is_cancelled_at_the_server(way: str) -> None:
    endless = itertools.repeat(TOKENS)
    with serving_script(Scripted(events=endless)) as service, Client(service.target) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        next(stream)
        assert not service.is_ended.is_set()
        if way == "drop":
            del stream
        else:
            getattr(stream, way)()
        assert service.is_ended.wait(60)


# TLS and the token


def test_token_travels_over_mutual_tls(tmp_path: Path) -> None:
    pki = Pki(tmp_path, "tandem.test")
    own = pki.ca.issue_cert("client.test")
    own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "own")
    tls = Tls(pki.client_ca, tmp_path / "own", tmp_path / "own", server_name="tandem.test")
    pair = (pki.key.read_bytes(), pki.cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], pki.client_ca.read_bytes(), True)
    with (
        serving_script(Scripted(), credentials) as service,
        Client(service.target, token="secret", tls=tls) as client,
    ):
        client.compare(pb.CompareRequest(prompt="x"))
    assert service.metadata["authorization"] == "Bearer secret"


def test_this_machine_is_not_asked_for_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving_script(Scripted()) as service, Client(service.target, max_attempts=1) as client:
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

    with serving_script(Scripted([(CODE.UNAVAILABLE, 1)] * 2)) as service:
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

    with serving_script(Scripted(events=[TOKENS, *COMPLETES, USAGE])) as service:
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

    with serving_script(Scripted(events=itertools.repeat(TOKENS))) as service:
        assert on(loop, leave(service.target))
