from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, explain, violations


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


def test_other_failures_are_explained_by_their_text() -> None:
    with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(grpc.RpcError) as caught:
        client.get_models()
    assert violations(caught.value) == {}
    assert explain(caught.value).startswith("UNAVAILABLE: ")


def test_response_beyond_the_default_of_4_mib_is_received() -> None:
    response = pb.CompareResponse(samples=[pb.Sample(text="x" * (5 << 20))])
    handler = grpc.unary_unary_rpc_method_handler(lambda *_: response.SerializeToString())
    server = grpc.server(ThreadPoolExecutor(1))
    name = "tandem.v1.InferenceService"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {"Compare": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}", timeout_s=30) as client:
        assert client.compare(pb.CompareRequest()) == response
    server.stop(None).wait()
