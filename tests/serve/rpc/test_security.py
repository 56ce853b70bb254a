"""A whole server with TLS, tokens and reflection: what is open, what is not, and what is shared."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.oip import grpc_service_pb2, grpc_service_pb2_grpc
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, ControlClient, Tls
from serve.pair.served import Role
from serve.rpc.credentials.tokens import new_token
from tests.support.rpc.authorities import Pki

CODE = grpc.StatusCode
SECRET = "the patient is called Alice"
SCOPES = {"ada": "inference", "bob": "inference", "ops": "control,reflection"}


@pytest.fixture(scope="module")
def tokens() -> dict[str, tuple[str, str]]:
    """Token and hash by client."""
    return {name: new_token() for name in SCOPES}


@pytest.fixture(scope="module")
def secured(
    serving: Any,
    make_pair: Any,
    tokens: dict[str, tuple[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, Tls]]:
    folder = tmp_path_factory.mktemp("tls")
    pki = Pki(folder)
    lines = [f"{name} {tokens[name][1]} {scopes}" for name, scopes in SCOPES.items()]
    (folder / "tokens").write_text("\n".join(lines))
    settings = {
        "tls_cert": pki.cert,
        "tls_key": pki.key,
        "auth_tokens": folder / "tokens",
        "reflection": True,
    }
    with serving(make_pair(), **settings) as live:
        yield live, Tls(ca=pki.client_ca)


def request(**fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=2)
    return pb.GenerateRequest(**({"prompt": "x", "sampling": sampling} | fields))


def secure_channel(secured: tuple[Any, Tls], address: str) -> grpc.Channel:
    ca = secured[1].ca
    assert ca is not None
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes()))


def test_token_over_tls_is_served_on_the_listener_of_its_scope(
    secured: tuple[Any, Tls], tokens: dict[str, tuple[str, str]]
) -> None:
    live, tls = secured
    ada, ops = tokens["ada"][0], tokens["ops"][0]
    with Client(live.server.address, token=ada, tls=tls, timeout_s=30) as client:
        assert client.generate(request()).result().samples
    with ControlClient(live.server.control_address, token=ops, tls=tls, timeout_s=30) as control:
        assert control.status().version
    for caller, address, token in (
        (Client.get_models, live.server.address, ops),
        (ControlClient.status, live.server.control_address, ada),
    ):
        kind = Client if caller is Client.get_models else ControlClient
        with kind(address, token=token, tls=tls, timeout_s=30, max_attempts=1) as refused:
            with pytest.raises(grpc.RpcError) as caught:
                caller(refused)
            assert caught.value.code() is CODE.UNAUTHENTICATED


def test_without_tls_nobody_is_served(secured: tuple[Any, Tls]) -> None:
    address = secured[0].server.address
    with (
        Client(address, timeout_s=5, max_attempts=1) as client,
        pytest.raises(grpc.RpcError) as caught,
    ):
        client.get_models()
    assert caught.value.code() is CODE.UNAVAILABLE


def test_health_needs_no_token(secured: tuple[Any, Tls]) -> None:
    for address in (secured[0].server.address, secured[0].server.control_address):
        with secure_channel(secured, address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=10)
        assert status.status == health_pb2.HealthCheckResponse.SERVING


def test_probes_of_triton_need_no_token(secured: tuple[Any, Tls]) -> None:
    with secure_channel(secured, secured[0].server.address) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(grpc_service_pb2.ServerReadyRequest(), timeout=10).ready
        with pytest.raises(grpc.RpcError) as caught:
            stub.ServerMetadata(grpc_service_pb2.ServerMetadataRequest(), timeout=10)
    assert caught.value.code() is CODE.UNAUTHENTICATED


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_needs_its_scope(secured: tuple[Any, Tls], version: str) -> None:
    with secure_channel(secured, secured[0].server.address) as channel:
        assert code_of_reflection(channel, version) is CODE.UNAUTHENTICATED


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_is_off_by_default(live: Any, version: str) -> None:
    assert code_of_reflection(live.channel, version) is CODE.UNIMPLEMENTED


def code_of_reflection(channel: grpc.Channel, version: str) -> grpc.StatusCode:
    method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    with pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(method)(iter([b""]), timeout=30))
    code: grpc.StatusCode = caught.value.code()
    return code


def test_engines_know_whose_a_request_is(
    secured: tuple[Any, Tls], tokens: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, tls = secured
    clients: list[str] = []
    for model in live.pair.engines.loaded:
        for name in ("submit", "score"):
            do = getattr(model.engine, name)

            def note(request: Any, *sink: Any, do: Any = do) -> Any:
                clients.append(request.client)
                return do(request, *sink)

            monkeypatch.setattr(model.engine, name, note)
    with Client(live.server.address, token=tokens["ada"][0], tls=tls, timeout_s=30) as client:
        client.compare(pb.CompareRequest(prompt="x"))
        client.score(pb.ScoreRequest(prompt="x", completions=[pb.Completion(text="y")]))
    assert len(clients) >= 6 and set(clients) == {"client ada"}


def test_tenants_share_neither_cached_prompts_nor_request_ids(
    secured: tuple[Any, Tls], tokens: dict[str, tuple[str, str]]
) -> None:
    live, tls = secured
    prompt = "y" * 100  # longer than a block of the prefix cache
    cached = {}
    for turn in ("ada 1", "ada 2", "bob 1"):
        name = turn.split()[0]
        with Client(live.server.address, token=tokens[name][0], tls=tls, timeout_s=30) as client:
            mine = request(prompt=prompt, route=pb.ROUTE_STUDENT, request_id=turn)
            (usage,) = client.generate(mine).result().usage.roles
            cached[turn] = usage.cached_prompt_tokens
            other = request(prompt=name, request_id="of each client its own")
            assert client.generate(other).result().samples
    assert cached == {"ada 1": 0, "ada 2": 100, "bob 1": 0}


def test_prompts_and_answers_are_never_logged(
    serving: Any, make_pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), serving(make_pair(), log_requests=True) as live:
        long = pb.SamplingParams(max_tokens=60, ignore_eos=True, seed=0)
        asked = request(prompt=SECRET, sampling=long)
        (answer,) = live.client.generate(asked).result().samples
        backend = live.pair.backends[Role.STUDENT]
        backend.error = RuntimeError("broken on purpose")
        for bad in (
            request(prompt=SECRET),
            request(prompt=SECRET, sampling=pb.SamplingParams(top_p=7)),
            request(prompt=SECRET, evaluation=pb.EvaluationOptions(answer_format=SECRET)),
            request(prompt=SECRET * 100),
        ):
            with pytest.raises(grpc.RpcError):
                live.client.generate(bad).result()
    assert "broken on purpose" in caplog.text and "INVALID_ARGUMENT" in caplog.text
    assert "patient" not in caplog.text and "Alice" not in caplog.text
    assert answer.text not in caplog.text
