"""Settings of an Open Inference request: as parameters, as tensors, or in a JSON object.

Forms and names are checked here; which values are allowed is up to `serve.rpc.validation`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from protos.oip import grpc_service_pb2 as oip
from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import InvalidFieldError
from serve.rpc.checks import shown
from serve.rpc.triton.tensors import Tensor

MAX_UINT32 = (1 << 32) - 1
_MAX_UINT64 = (1 << 64) - 1
# Of a setting that is text, JSON too: of all settings as JSON several times the most.
_MAX_TEXT_BYTES = 1 << 16
_MAX_LIST = 256  # more than any list of settings may have


@dataclass(frozen=True, slots=True)
class InferSetting:
    """A named value: how it is described as a tensor, and how any of its forms is read.

    `read` takes what a parameter, an element of a tensor or a member of a JSON object holds, and
    raises a ValueError that says what is allowed.
    """

    datatype: str
    read: Callable[[Any], Any]
    is_list: bool = False


def _read_float(value: Any) -> float:
    if isinstance(value, str):
        value = _parse(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number") from None


def _read_whole(value: Any, high: int) -> int:
    if isinstance(value, str):
        value = _parse(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise ValueError(f"a whole number, 0 to {high}")
    return value


def _read_uint32(value: Any) -> int:
    return _read_whole(value, MAX_UINT32)


def _read_uint64(value: Any) -> int:
    return _read_whole(value, _MAX_UINT64)


def _read_bool(value: Any) -> bool:
    if isinstance(value, str):
        value = _parse(value)
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def read_text(value: Any) -> str:
    if not isinstance(value, bytes | str):
        raise ValueError("a string")
    try:
        # A string, too: JSON can hold half of a surrogate pair, which is no text.
        data = value.encode() if isinstance(value, str) else value
        return data.decode()
    except UnicodeError:
        raise ValueError("UTF-8") from None


def _parse(text: str) -> Any:
    """Return the number or flag that a text stands for; the text itself if it is neither.

    Command lines have texts for values: perf_analyzer cannot send a fraction in another form.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# Those of tandem.v1.SamplingParams; num_samples is always 1.
SAMPLING: Mapping[str, InferSetting] = {
    "temperature": InferSetting("FP32", _read_float),
    "top_p": InferSetting("FP32", _read_float),
    "top_k": InferSetting("INT32", _read_uint32),
    "min_p": InferSetting("FP32", _read_float),
    "max_tokens": InferSetting("INT32", _read_uint32),
    "min_tokens": InferSetting("INT32", _read_uint32),
    "seed": InferSetting("UINT64", _read_uint64),
    "stop": InferSetting("BYTES", read_text, is_list=True),
    "stop_token_ids": InferSetting("INT32", _read_uint32, is_list=True),
    "ignore_eos": InferSetting("BOOL", _read_bool),
    "repetition_penalty": InferSetting("FP32", _read_float),
}
_SAMPLING_PARAMETERS = "sampling_parameters"
AS_TENSORS: Mapping[str, InferSetting] = {
    **SAMPLING,
    _SAMPLING_PARAMETERS: InferSetting("BYTES", read_text),
    "stream": InferSetting("BOOL", _read_bool),
    "exclude_input_in_output": InferSetting("BOOL", _read_bool),
}
_AS_PARAMETERS: Mapping[str, InferSetting] = {
    **AS_TENSORS,
    "divergence": InferSetting("BOOL", _read_bool),
    "request_id": InferSetting("BYTES", read_text),
    "timeout": InferSetting("UINT64", _read_uint64),
    "triton_enable_empty_final_response": InferSetting("BOOL", _read_bool),
}
PROMPTS = {"input_ids": "INT64", "text_input": "BYTES"}


class InferSettings:
    """What a request says besides its prompt, by name, and where it says it (`places`)."""

    def __init__(self, source: oip.ModelInferRequest, tensors: Mapping[str, Tensor]) -> None:
        self._values: dict[str, Any] = {}
        self.places = {
            "prompt": "inputs[text_input]",
            "prompt_token_ids.ids": "inputs[input_ids]",
        }
        if len(source.parameters) > len(_AS_PARAMETERS):
            raise InvalidFieldError.of(
                "parameters",
                f"has {len(source.parameters)} of them; there are only {', '.join(_AS_PARAMETERS)}",
            )
        for name, parameter in sorted(source.parameters.items()):
            choice = parameter.WhichOneof("parameter_choice")
            value = getattr(parameter, choice) if choice else None
            self._add(name, value, f"parameters[{shown(name)}]", _AS_PARAMETERS)
        for name, tensor in tensors.items():
            if name not in PROMPTS:
                self._add_tensor(tensor)
        if _SAMPLING_PARAMETERS in self._values:
            self._add_json(self._values[_SAMPLING_PARAMETERS], self.places[_SAMPLING_PARAMETERS])

    def get(self, name: str, default: Any) -> Any:
        return self._values.get(name, default)

    def sampling(self) -> pb.SamplingParams:
        given = {name: value for name, value in self._values.items() if name in SAMPLING}
        return pb.SamplingParams(**given)

    def _add_tensor(self, tensor: Tensor) -> None:
        name = tensor.name
        if name not in AS_TENSORS:
            raise unknown_name(tensor.path, (*PROMPTS, *AS_TENSORS))
        values = tensor.values
        if AS_TENSORS[name].is_list:
            self._add(name, values, tensor.path, AS_TENSORS)
        elif len(values) == 1:
            self._add(name, values[0], tensor.path, AS_TENSORS)
        else:
            raise InvalidFieldError.of(tensor.path, f"has {len(values)} elements; must have one")

    def _add_json(self, text: str, path: str) -> None:
        try:
            members = json.loads(text)
        except (ValueError, RecursionError):
            members = None
        if not isinstance(members, dict):
            raise InvalidFieldError.of(path, "is not a JSON object")
        for name, value in members.items():
            self._add(name, value, f"{path}.{shown(name)}", SAMPLING)

    def _add(self, name: str, value: Any, path: str, known: Mapping[str, InferSetting]) -> None:
        if name not in known:
            raise unknown_name(path, known)
        if name in self._values:
            raise InvalidFieldError.of(path, f"is given twice, also as {self.places[name]}")
        setting, self.places[name] = known[name], path
        if not setting.is_list:
            self._values[name] = _read(setting, value, path)
            return
        values = value if isinstance(value, list) else [value]
        if len(values) > _MAX_LIST:
            raise InvalidFieldError.of(
                path, f"has {len(values)} elements; must have at most {_MAX_LIST}"
            )
        self._values[name] = [
            _read(setting, one, f"{path}[{index}]") for index, one in enumerate(values)
        ]


def unknown_name(path: str, known: Iterable[str]) -> InvalidFieldError:
    return InvalidFieldError.of(path, f"is not known; must be one of {', '.join(known)}")


def _read(setting: InferSetting, value: Any, path: str) -> Any:
    if isinstance(value, bytes | str) and len(value) > _MAX_TEXT_BYTES:
        raise InvalidFieldError.of(
            path, f"has a length of {len(value)}; must have at most {_MAX_TEXT_BYTES}"
        )
    try:
        return setting.read(value)
    except ValueError as allowed:
        raise InvalidFieldError.of(path, f"is {shown(repr(value))}; must be {allowed}") from None
