"""Tensors of the Open Inference Protocol: bytes and typed lists in, Python values out, and back.

Knows layouts, not meanings; what a tensor is for is in `serve.infer_requests`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos.oip import grpc_service_pb2 as oip
from serve.errors import InvalidFieldError

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
    """A tensor's elements, row by row: `bytes`, `bool`, `int` or `float`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]

    @property
    def path(self) -> str:
        return f"inputs[{self.name}]"

    def row(self) -> list[Any]:
        """Return the elements of a list, `[n]`, or of a batch of one, `[1, n]`.

        Raises:
            InvalidFieldError: any other shape.
        """
        if len(self.shape) == 1 or (len(self.shape) == 2 and self.shape[0] == 1):
            return self.values
        raise InvalidFieldError.of(
            self.path,
            f"has shape {list(self.shape)}; must be [n] or [1, n]: a request has one prompt, send "
            "more of them as requests of their own",
        )


def read_inputs(request: oip.ModelInferRequest) -> dict[str, Tensor]:
    """Return a request's input tensors by name.

    Raises:
        InvalidFieldError: a name comes twice, or datatype, shape and elements do not fit together.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidFieldError.of(
            "raw_input_contents",
            f"has {len(raw)} tensors; must have those of all {len(request.inputs)} inputs, or none",
        )
    tensors: dict[str, Tensor] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in tensors:
            raise InvalidFieldError.of(f"inputs[{tensor.name}]", "is given twice")
        tensors[tensor.name] = _read(tensor, raw[index] if raw else None)
    return tensors


def write_output(
    response: oip.ModelInferResponse, name: str, datatype: str, values: Sequence[Any]
) -> None:
    """Append an output: BYTES `[n]`, numbers `[1, n]`."""
    shape = [len(values)] if datatype == "BYTES" else [1, len(values)]
    response.outputs.add(name=name, datatype=datatype, shape=shape)
    response.raw_output_contents.append(_pack(datatype, values))


def _read(tensor: oip.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    path = f"inputs[{tensor.name}]"
    if tensor.datatype not in _LAYOUTS:
        raise InvalidFieldError.of(
            path, f"has datatype {tensor.datatype!r}; must be one of {', '.join(_LAYOUTS)}"
        )
    if tensor.parameters:
        raise InvalidFieldError.of(
            f"{path}.parameters", f"has {', '.join(sorted(tensor.parameters))}; must be empty"
        )
    if any(size < 0 for size in tensor.shape):
        raise InvalidFieldError.of(path, f"has shape {list(tensor.shape)}; must be 0 or above")
    values = _unpack(path, tensor.datatype, raw) if raw is not None else _typed(path, tensor)
    num_elements = math.prod(tensor.shape)
    if len(values) != num_elements:
        raise InvalidFieldError.of(
            path, f"has {len(values)} elements; its shape {list(tensor.shape)} needs {num_elements}"
        )
    return Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), values)


def _typed(path: str, tensor: oip.ModelInferRequest.InferInputTensor) -> list[Any]:
    field = _LAYOUTS[tensor.datatype][1]
    others = [f.name for f, _ in tensor.contents.ListFields() if f.name != field]
    if others:
        raise InvalidFieldError.of(
            f"{path}.contents", f"has {others[0]}; a {tensor.datatype} tensor has {field}"
        )
    return list(getattr(tensor.contents, field))


def _unpack(path: str, datatype: str, raw: bytes) -> list[Any]:
    dtype = _LAYOUTS[datatype][0]
    if not dtype:
        return _unpack_bytes(path, raw)
    itemsize = np.dtype(dtype).itemsize
    if len(raw) % itemsize:
        raise InvalidFieldError.of(
            path, f"has {len(raw)} bytes; a {datatype} element takes {itemsize}"
        )
    values: list[Any] = np.frombuffer(raw, dtype).tolist()
    return values


def _unpack_bytes(path: str, raw: bytes) -> list[bytes]:
    elements, start = [], 0
    while start < len(raw):
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
