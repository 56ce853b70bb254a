"""The models as the Open Inference Protocol names and describes them."""

from __future__ import annotations

from collections.abc import Iterator

from protos.oip import grpc_service_pb2 as oip
from serve.errors import ModelNotLoadedError
from serve.pair.served import Role
from serve.rpc.checks import quoted
from serve.rpc.triton.settings import AS_TENSORS, PROMPTS

NAME = "tandem"
VERSION = "1"
OUTPUTS = {"output_ids": "INT64", "text_output": "BYTES", "logprobs": "FP64", "k3": "FP64"}

TensorMetadata = oip.ModelMetadataResponse.TensorMetadata


def to_role(name: str, version: str) -> Role:
    """Return the model of that name.

    Raises:
        ModelNotLoadedError: there is no such model, or no such version.
    """
    names = [role.value for role in Role]
    if name not in names:
        raise ModelNotLoadedError(
            f"model {quoted(name)} is not known; must be one of {', '.join(names)}"
        )
    if version not in ("", VERSION):
        raise ModelNotLoadedError(
            f"model {name} has no version {quoted(version)}; it has {VERSION}"
        )
    return Role(name)


def to_metadata(role: Role, *, has_k3: bool) -> oip.ModelMetadataResponse:
    """Describe a model; k3 is there where another model can be compared with it."""
    return oip.ModelMetadataResponse(
        name=role.value,
        versions=[VERSION],
        platform=NAME,
        inputs=_inputs(),
        outputs=_outputs(has_k3),
    )


def to_config(role: Role, *, has_k3: bool) -> oip.ModelConfig:
    """Describe a model as Triton's tools want it: see ModelTransactionPolicy for `decoupled`."""
    return oip.ModelConfig(
        name=role.value,
        platform=NAME,
        backend=NAME,
        input=[
            oip.ModelInput(
                name=tensor.name,
                data_type=_data_type(tensor.datatype),
                dims=tensor.shape,
                optional=True,
            )
            for tensor in _inputs()
        ],
        output=[
            oip.ModelOutput(
                name=tensor.name, data_type=_data_type(tensor.datatype), dims=tensor.shape
            )
            for tensor in _outputs(has_k3)
        ],
        model_transaction_policy=oip.ModelTransactionPolicy(decoupled=False),
    )


def _inputs() -> Iterator[TensorMetadata]:
    """Yield what a request may have, the two forms of the prompt first."""
    yield TensorMetadata(name="input_ids", datatype=PROMPTS["input_ids"], shape=[1, -1])
    yield TensorMetadata(name="text_input", datatype=PROMPTS["text_input"], shape=[1])
    for name, setting in AS_TENSORS.items():
        shape = [-1] if setting.is_list else [1]
        yield TensorMetadata(name=name, datatype=setting.datatype, shape=shape)


def _outputs(has_k3: bool) -> Iterator[TensorMetadata]:
    for name, datatype in OUTPUTS.items():
        if name != "k3" or has_k3:
            shape = [1] if datatype == "BYTES" else [1, -1]
            yield TensorMetadata(name=name, datatype=datatype, shape=shape)


def _data_type(datatype: str) -> str:
    """Return the name of a datatype in a ModelConfig."""
    return f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}"
