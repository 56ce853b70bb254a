"""Reflection as tools use it, in both of its versions: buf curl knows nothing of our protos."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import (  # type: ignore[import-untyped]
    ServerReflectionResponse,
)

BUF = Path(sys.executable).parent / "buf"
VERSIONS = ("v1", "v1alpha")
NAMES = {f"grpc.reflection.{version}.ServerReflection" for version in VERSIONS}


@pytest.fixture(scope="module")
def reflecting(serving: Any, make_pair: Any) -> Iterator[Any]:
    with serving(make_pair(), reflection=True) as live:
        yield live


def buf_curl(address: str, version: str, path: str, *arguments: str) -> str:
    plain = ("--protocol", "grpc", "--http2-prior-knowledge")
    command = [BUF, "curl", *plain, "--reflect-protocol", f"grpc-{version}", *arguments]
    result = subprocess.run(
        [*command, f"http://{address}{path}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_tool_calls_what_it_was_never_told(reflecting: Any, version: str) -> None:
    address = reflecting.server.address
    models = buf_curl(address, version, "/tandem.v1.InferenceService/GetModels")
    assert [model["role"] for model in json.loads(models)["models"]] == [
        "ROLE_STUDENT",
        "ROLE_TEACHER",
    ]
    request = '{"prompt": "x", "sampling": {"max_tokens": 2}}'
    compared = buf_curl(address, version, "/tandem.v1.InferenceService/Compare", "--data", request)
    # 64 bits are a text in JSON (protobuf.dev, "ProtoJSON"), of which JavaScript makes a number.
    seed = json.loads(compared)["usage"]["seed"]
    assert isinstance(seed, str) and int(float(seed)) == int(seed)


@pytest.mark.parametrize("version", VERSIONS)
def test_tool_lists_the_services_of_each_listener(reflecting: Any, version: str) -> None:
    listed = buf_curl(reflecting.server.address, version, "", "--list-services").split()
    expected = {"tandem.v1.InferenceService", "inference.GRPCInferenceService"}
    assert set(listed) == {*expected, "grpc.health.v1.Health", *NAMES}
    listed = buf_curl(reflecting.server.control_address, version, "", "--list-services").split()
    assert set(listed) == {"tandem.v1.ControlService", "grpc.health.v1.Health", *NAMES}


def ask(channel: grpc.Channel, version: str, request: Any) -> Any:
    method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    call = channel.stream_stream(
        method, lambda message: message.SerializeToString(), ServerReflectionResponse.FromString
    )
    (response,) = call(iter([request]), timeout=30)
    return response


def test_descriptor_of_v1_has_what_clients_of_v1_send(reflecting: Any) -> None:
    """A client made of it alone, as grpcui is when it looks at every service of the list."""
    symbol = "grpc.reflection.v1.ServerReflection"
    request = type(ServerReflectionResponse().original_request)(file_containing_symbol=symbol)
    (data,) = ask(reflecting.channel, "v1", request).file_descriptor_response.file_descriptor_proto
    pool = descriptor_pool.DescriptorPool()
    pool.Add(FileDescriptorProto.FromString(data))
    (method,) = pool.FindServiceByName(symbol).methods
    assert method.client_streaming and method.server_streaming
    message = message_factory.GetMessageClass(method.input_type)(list_services="")
    assert message.DESCRIPTOR.full_name == "grpc.reflection.v1.ServerReflectionRequest"
    services = ask(reflecting.channel, "v1", message).list_services_response.service
    assert {service.name for service in services} > NAMES


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_not_there_is_not_found(reflecting: Any, version: str) -> None:
    request = type(ServerReflectionResponse().original_request)(file_containing_symbol="a.B")
    error = ask(reflecting.channel, version, request).error_response
    assert error.error_code == grpc.StatusCode.NOT_FOUND.value[0]
