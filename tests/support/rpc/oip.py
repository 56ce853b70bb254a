"""Requests of the Open Inference Protocol, and what their responses hold."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np

from protos.oip import grpc_service_pb2 as oip
from protos.oip import grpc_service_pb2_grpc as oip_grpc

PROMPT = "1+1="
_DTYPES = {"INT64": "<i8", "FP64": "<f8"}
_FIELDS = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
InputTensor = oip.ModelInferRequest.InferInputTensor
OutputTensor = oip.ModelInferRequest.InferRequestedOutputTensor


def tensor(name: str, datatype: str, shape: list[int], **contents: Any) -> InputTensor:
    return InputTensor(
        name=name,
        datatype=datatype,
        shape=shape,
        contents=oip.InferTensorContents(**contents) if contents else None,
    )


def text_input(text: bytes = PROMPT.encode()) -> InputTensor:
    return tensor("text_input", "BYTES", [1], bytes_contents=[text])


def ids(shape: list[int], values: list[int]) -> InputTensor:
    return tensor("input_ids", "INT64", shape, int64_contents=values)


def infer_request(
    *inputs: InputTensor, model: str = "student", outputs: str = "", id: str = "", **settings: Any
) -> oip.ModelInferRequest:
    """Return a request of one text, eight tokens and a seed, unless said otherwise."""
    settings = {"max_tokens": 8, "seed": 7, **settings}
    return oip.ModelInferRequest(
        model_name=model,
        id=id,
        inputs=inputs or [text_input()],
        outputs=[OutputTensor(name=name) for name in outputs.split()],
        parameters={
            name: oip.InferParameter(**{_FIELDS[type(value)]: value})
            for name, value in settings.items()
        },
    )


def value_of(response: oip.ModelInferResponse, name: str) -> Any:
    """Return an output as a list, or as text; None where it is absent."""
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == name and output.datatype == "BYTES":
            assert output.shape == [1] and len(raw) == 4 + int.from_bytes(raw[:4], "little")
            return raw[4:].decode()
        if output.name == name:
            values = np.frombuffer(raw, _DTYPES[output.datatype]).reshape(output.shape)
            assert values.shape[0] == 1
            return values[0].tolist()
    return None


def names_of(response: oip.ModelInferResponse) -> list[str]:
    return [output.name for output in response.outputs]


def is_final(response: oip.ModelInferResponse) -> bool:
    return response.parameters["triton_final_response"].bool_param


def stub_of(live: Any) -> oip_grpc.GRPCInferenceServiceStub:
    return oip_grpc.GRPCInferenceServiceStub(live.channel)


class Stream:
    """A stream that stays open while responses are read."""

    def __init__(self, stub: oip_grpc.GRPCInferenceServiceStub, timeout_s: float = 30) -> None:
        self._requests: queue.Queue[oip.ModelInferRequest | None] = queue.Queue()
        self.call = stub.ModelStreamInfer(iter(self._requests.get, None), timeout=timeout_s)

    def send(self, *requests: oip.ModelInferRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def close(self) -> None:
        self._requests.put(None)

    def read(self) -> oip.ModelStreamInferResponse:
        return next(self.call)


def stream(live: Any, *requests: oip.ModelInferRequest) -> list[oip.ModelInferResponse]:
    """Return all responses to requests of a stream, which succeed."""
    responses = list(stub_of(live).ModelStreamInfer(iter(requests), timeout=30))
    assert not any(response.error_message for response in responses)
    return [response.infer_response for response in responses]
