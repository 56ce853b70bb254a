"""How the Open Inference Protocol describes server and models."""

from __future__ import annotations

import itertools
from typing import Any

import grpc
import pytest

from protos.oip import grpc_service_pb2 as oip
from serve.client import violations
from serve.pair.served import Role
from tests.support.rpc.calls import failure
from tests.support.rpc.oip import infer_request, stub_of, text_input, value_of

CODE = grpc.StatusCode


@pytest.fixture
def stub(live: Any) -> Any:
    return stub_of(live)


def test_descriptor_has_the_protocols_name() -> None:
    assert (oip.DESCRIPTOR.name, oip.DESCRIPTOR.package) == ("grpc_service.proto", "inference")


def test_server_and_models_are_ready(stub: Any) -> None:
    assert stub.ServerLive(oip.ServerLiveRequest()).live
    assert stub.ServerReady(oip.ServerReadyRequest()).ready
    for name, version in itertools.product(("student", "teacher"), ("", "1")):
        assert stub.ModelReady(oip.ModelReadyRequest(name=name, version=version)).ready
    index = stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=True))
    assert [(m.name, m.version, m.state) for m in index.models] == [
        ("student", "1", "READY"),
        ("teacher", "1", "READY"),
    ]


def test_readiness_follows_the_engines(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        stub = stub_of(live)
        pair.engines.teacher.engine.stop()
        assert not stub.ServerReady(oip.ServerReadyRequest()).ready
        assert stub.ModelReady(oip.ModelReadyRequest(name="student")).ready
        assert not stub.ModelReady(oip.ModelReadyRequest(name="teacher")).ready
        assert len(stub.RepositoryIndex(oip.RepositoryIndexRequest()).models) == 2
        (ready,) = stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=True)).models
        assert ready.name == "student"
        live.stop_soon().result(30)


def test_metadata_and_config_describe_the_same_tensors(stub: Any) -> None:
    metadata = stub.ModelMetadata(oip.ModelMetadataRequest(name="teacher"))
    config = stub.ModelConfig(oip.ModelConfigRequest(name="teacher")).config
    assert (metadata.name, list(metadata.versions), config.name) == ("teacher", ["1"], "teacher")
    assert {metadata.platform, config.platform, config.backend} == {"tandem"}
    assert config.max_batch_size == 0 and not config.model_transaction_policy.decoupled
    for described, configured in (
        (metadata.inputs, config.input),
        (metadata.outputs, config.output),
    ):
        assert [(t.name, t.shape) for t in described] == [(t.name, t.dims) for t in configured]
        datatypes = [oip.DataType.Name(t.data_type).removeprefix("TYPE_") for t in configured]
        assert [t.datatype.replace("BYTES", "STRING") for t in described] == datatypes
    assert [t.name for t in metadata.outputs] == ["output_ids", "text_output", "logprobs", "k3"]
    assert [t.name for t in metadata.inputs][:2] == ["input_ids", "text_input"]
    assert all(t.optional for t in config.input)


def test_server_has_a_version_and_no_extensions(stub: Any) -> None:
    metadata = stub.ServerMetadata(oip.ServerMetadataRequest())
    assert metadata.name == "tandem" and metadata.version and not metadata.extensions


@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("judge", "", "model 'judge' is not known; must be one of student, teacher"),
        ("", "", "model '' is not known; must be one of student, teacher"),
        ("student", "2", "model student has no version '2'; it has 1"),
    ],
)
def test_unknown_model_is_not_found(stub: Any, name: str, version: str, text: str) -> None:
    request = oip.ModelInferRequest(model_name=name, model_version=version, inputs=[text_input()])
    for call in (
        lambda: stub.ModelReady(oip.ModelReadyRequest(name=name, version=version)),
        lambda: stub.ModelMetadata(oip.ModelMetadataRequest(name=name, version=version)),
        lambda: stub.ModelConfig(oip.ModelConfigRequest(name=name, version=version)),
        lambda: stub.ModelInfer(request),
    ):
        error = failure(call)
        assert (error.code(), error.details()) == (CODE.NOT_FOUND, text)


def test_there_is_one_repository(stub: Any) -> None:
    request = oip.RepositoryIndexRequest(repository_name="other")
    error = failure(lambda: stub.RepositoryIndex(request))
    assert error.code() is CODE.INVALID_ARGUMENT
    assert list(violations(error)) == ["repository_name"]


def test_student_alone_has_no_k3_and_no_teacher(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as live:
        stub = stub_of(live)
        metadata = stub.ModelMetadata(oip.ModelMetadataRequest(name="student"))
        assert "k3" not in [output.name for output in metadata.outputs]
        for request, code in (
            (infer_request(outputs="k3"), CODE.FAILED_PRECONDITION),
            (infer_request(model="teacher"), CODE.NOT_FOUND),
        ):
            assert failure(lambda request=request: stub.ModelInfer(request)).code() is code
        assert value_of(stub.ModelInfer(infer_request()), "output_ids")
