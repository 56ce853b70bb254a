"""Tensors of the Open Inference Protocol: bytes and typed lists in, Python values out, and back.

Knows layouts, not meanings; what a tensor is for is in `serve.rpc.triton.requests`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos.oip import grpc_service_pb2 as oip
from serve.errors import InvalidFieldError, TooManyTokensError
from serve.rpc.checks import MAX_SHOWN_CHARS, quoted, shown

_MAX_INPUTS = 64  # more than there are names of inputs
_LENGTH_BYTES = 4  # of a BYTES element stand before it, little-endian

# Datatype → numpy's name of it (none: BYTES), and the field of InferTensorContents.
_LAYOUTS = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("<i1", "int_contents"),
    "INT16": ("<i2", "int_contents"),
    "INT32": ("<i4", "int_contents"),
    "INT64": ("<i8", "int64_contents"),
    "UINT8": ("<u1", "uint_contents"),
    "UINT16": ("<u2", "uint_contents"),
    "UINT32": ("<u4", "uint_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "FP32": ("<f4", "fp32_contents"),
    "FP64": ("<f8", "fp64_contents"),
    "BYTES": ("", "bytes_contents"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """The elements, `bytes`, `bool`, `int` or `float`, of a list or of a batch of one."""

    name: str
    datatype: str
    values: list[Any]

    @property
    def path(self) -> str:
        return f"inputs[{shown(self.name)}]"


def read_inputs(request: oip.ModelInferRequest, max_elements: int) -> dict[str, Tensor]:
    """Return a request's input tensors by name.

    Raises:
        TooManyTokensError: one has more than `max_elements`.
        InvalidFieldError: a name comes twice, a shape is neither `[n]` nor `[1, n]`, or datatype,
            shape and elements do not fit together.
    """
    if len(request.inputs) > _MAX_INPUTS:
        raise InvalidFieldError.of(
            "inputs", f"has {len(request.inputs)} tensors; must have at most {_MAX_INPUTS}"
        )
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidFieldError.of(
            "raw_input_contents",
            f"has {len(raw)} tensors; must have those of all {len(request.inputs)} inputs, or none",
        )
    tensors: dict[str, Tensor] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in tensors:
            raise InvalidFieldError.of(f"inputs[{shown(tensor.name)}]", "is given twice")
        tensors[tensor.name] = _read(tensor, raw[index] if raw else None, max_elements)
    return tensors


def write_output(
    response: oip.ModelInferResponse, name: str, datatype: str, values: Sequence[Any]
) -> None:
    """Append an output: BYTES `[n]`, numbers `[1, n]`."""
    shape = [len(values)] if datatype == "BYTES" else [1, len(values)]
    response.outputs.add(name=name, datatype=datatype, shape=shape)
    response.raw_output_contents.append(_pack(datatype, values))


def _read(
    tensor: oip.ModelInferRequest.InferInputTensor, raw: bytes | None, max_elements: int
) -> Tensor:
    path = f"inputs[{shown(tensor.name)}]"
    if tensor.datatype not in _LAYOUTS:
        raise InvalidFieldError.of(
            path,
            f"has datatype {quoted(tensor.datatype)}; must be one of {', '.join(_LAYOUTS)}",
        )
    check_no_parameters(path, tensor.parameters)
    num_elements = _num_elements(path, tensor.shape)
    packed = (
        _typed(path, tensor) if raw is None else _unpack(path, tensor.datatype, raw, num_elements)
    )
    if len(packed) != num_elements:
        raise InvalidFieldError.of(
            path, f"has {len(packed)} elements; its shape {list(tensor.shape)} needs {num_elements}"
        )
    # Before there is a Python object for each.
    if num_elements > max_elements:
        raise TooManyTokensError(path, num_elements, max_elements)
    values = packed.tolist() if isinstance(packed, np.ndarray) else list(packed)
    return Tensor(tensor.name, tensor.datatype, values)


def check_no_parameters(path: str, parameters: Mapping[str, object]) -> None:
    """Raise InvalidFieldError if a tensor has any: what shared memory and classes need."""
    if parameters:
        raise InvalidFieldError.of(
            f"{path}.parameters", f"has {shown(next(iter(parameters)))}; must be empty"
        )


def _num_elements(path: str, shape: Sequence[int]) -> int:
    """Return the n of `[n]` or `[1, n]`; a longer shape is not even multiplied."""
    is_row = len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)
    if is_row and shape[-1] >= 0:
        return shape[-1]
    raise InvalidFieldError.of(
        path,
        f"has shape {shown(list(shape[:MAX_SHOWN_CHARS]))}; must be [n] or [1, n]: a request has "
        "one prompt, send more of them as requests of their own",
    )


def _typed(path: str, tensor: oip.ModelInferRequest.InferInputTensor) -> Sequence[Any]:
    field = _LAYOUTS[tensor.datatype][1]
    others = [f.name for f, _ in tensor.contents.ListFields() if f.name != field]
    if others:
        raise InvalidFieldError.of(
            f"{path}.contents", f"has {others[0]}; a {tensor.datatype} tensor has {field}"
        )
    elements: Sequence[Any] = getattr(tensor.contents, field)
    return elements


def _unpack(
    path: str, datatype: str, raw: bytes, num_elements: int
) -> Sequence[Any] | np.ndarray[Any, Any]:
    dtype = _LAYOUTS[datatype][0]
    if not dtype:
        return _unpack_bytes(path, raw, num_elements)
    itemsize = np.dtype(dtype).itemsize
    if len(raw) % itemsize:
        raise InvalidFieldError.of(
            path, f"has {len(raw)} bytes; a {datatype} element takes {itemsize}"
        )
    return np.frombuffer(raw, dtype)


def _unpack_bytes(path: str, raw: bytes, num_elements: int) -> list[bytes]:
    """Return the elements, of which no more than `num_elements` are allowed."""
    elements, start = list[bytes](), 0
    while start < len(raw):
        if len(elements) == num_elements:
            raise InvalidFieldError.of(path, f"has more elements than its shape, {num_elements}")
        begin = start + _LENGTH_BYTES
        start = begin + int.from_bytes(raw[start:begin], "little")
        if begin > len(raw) or start > len(raw):
            raise InvalidFieldError.of(
                path, "ends within an element; each stands behind its length in 4 bytes"
            )
        elements.append(raw[begin:start])
    return elements


def _pack(datatype: str, values: Sequence[Any]) -> bytes:
    dtype = _LAYOUTS[datatype][0]
    if dtype:
        return np.asarray(values, dtype).tobytes()
    return b"".join(len(value).to_bytes(_LENGTH_BYTES, "little") + value for value in values)
