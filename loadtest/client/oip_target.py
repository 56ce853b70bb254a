"""The Open Inference Protocol as a target: Triton, servers like it, and Tandem's own.

Arms are model names. The prompt is sent as it stands, in `text_input`: this protocol has no chat
template. One inference gives one completion, so a request with several samples is as many
inferences of one stream, with successive seeds. What models call their settings differs: each is
asked for its inputs first. Answers are extracted here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from bundle.errors import UserError
from estimators.answers import ANSWER_FORMATS, extract, is_correct
from estimators.canonical import canonicalise
from loadtest.client.targets import (
    CHECK_TIMEOUT_S,
    INCOMPLETE,
    Clock,
    Credentials,
    RequestFailedError,
    sample_of,
    to_failure,
)
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, PlannedRequest, RequestRecord, SampleRecord
from protos.oip import grpc_service_pb2 as oip
from protos.oip.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.client.channel import Endpoint
from serve.client.failures import explain

_PROMPT, _TEXT, _IDS = "text_input", "text_output", "output_ids"
_SETTINGS = "sampling_parameters"
# Set where a model has them: tokens as they come, and only those.
_SWITCHES = ("stream", "exclude_input_in_output")
_IS_FINAL, _WANTS_FINAL = "triton_final_response", "triton_enable_empty_final_response"
_ID_TYPES = {"INT64": "<i8", "INT32": "<i4", "UINT32": "<u4", "UINT64": "<u8"}
_LENGTH_BYTES = 4  # of a BYTES element stand before it, little-endian

InputTensor = oip.ModelInferRequest.InferInputTensor
OutputTensor = oip.ModelInferRequest.InferRequestedOutputTensor


@dataclass(frozen=True, slots=True)
class _Model:
    """What a model takes, name → number of dimensions, and whether it returns token ids."""

    num_dims: Mapping[str, int]
    has_ids: bool


class OipTarget:
    """A server of the Open Inference Protocol; nothing is sent twice."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Mapping[str, DatasetPrompt],
        credentials: Credentials = Credentials(),  # noqa: B008 - frozen
    ) -> None:
        """Connect at the first call; OSError and ValueError as `serve.client.channel.Endpoint`."""
        endpoint = Endpoint(config.target, credentials.token, credentials.tls, max_attempts=1)
        self._config = config
        self._prompts = prompts
        self._metadata = endpoint.metadata()
        self._channel = endpoint.open_async()
        self._stub: Any = GRPCInferenceServiceStub(self._channel)
        self._models: dict[str, _Model] = {}

    async def check(self) -> None:
        """Ask what each arm takes; UserError also for answers that only a Tandem server finds."""
        for prompt in self._prompts.values():
            if prompt.answer_format not in ANSWER_FORMATS:
                raise UserError(
                    f"--dataset: {prompt.prompt_id} has answer_format {prompt.answer_format!r}; "
                    f"with --protocol oip it must be one of {', '.join(ANSWER_FORMATS)}"
                )
        for arm in self._config.arms:
            self._models[arm] = await self._describe(arm)

    async def send(self, record: RequestRecord, clock: Clock) -> None:
        try:
            await self._receive(record, clock)
        except grpc.RpcError as error:
            raise to_failure(error) from None
        prompt = self._prompts[record.plan.prompt_id]
        for sample in record.samples:
            _judge(sample, prompt)

    async def wait_connected(self) -> None:
        await self._channel.channel_ready()

    async def close(self) -> None:
        await self._channel.close()

    async def _describe(self, arm: str) -> _Model:
        try:
            found = await self._stub.ModelMetadata(
                oip.ModelMetadataRequest(name=arm),
                timeout=CHECK_TIMEOUT_S,
                metadata=self._metadata,
            )
        except grpc.RpcError as error:
            raise UserError(f"--arms {arm} at {self._config.target}: {explain(error)}") from None
        inputs = {tensor.name: len(tensor.shape) for tensor in found.inputs}
        outputs = {tensor.name: tensor.datatype for tensor in found.outputs}
        if _PROMPT not in inputs or _TEXT not in outputs:
            raise UserError(
                f"--arms {arm}: it takes {', '.join(inputs)} and returns {', '.join(outputs)}; "
                f"must take {_PROMPT} and return {_TEXT}"
            )
        return _Model(inputs, outputs.get(_IDS) in _ID_TYPES)

    async def _receive(self, record: RequestRecord, clock: Clock) -> None:
        """Note tokens and texts as they come, up to the last response of each inference."""
        num_samples = self._config.num_samples
        texts = [bytearray() for _ in range(num_samples)]
        unfinished = set(range(num_samples))
        call = self._stub.ModelStreamInfer(
            iter([self._inference(record.plan, index) for index in range(num_samples)]),
            timeout=self._config.timeout_s,
            metadata=self._metadata,
        )
        try:
            async for message in call:
                now_s, response = clock(), message.infer_response
                if message.error_message:
                    raise _to_failure(message.error_message)
                index = _index_of(response, num_samples)
                texts[index] += _take(sample_of(record, index), response, now_s)
                if response.parameters[_IS_FINAL].bool_param:
                    unfinished.discard(index)
        finally:
            call.cancel()
        for sample, text in zip(record.samples, texts, strict=False):
            sample.text = text.decode(errors="replace")
        if unfinished:
            raise RequestFailedError(
                INCOMPLETE, f"the stream ended without the last response of {len(unfinished)}"
            )

    def _inference(self, plan: PlannedRequest, index: int) -> oip.ModelInferRequest:
        """Return the request for one sample; its id is the sample's index."""
        prompt, model = self._prompts[plan.prompt_id], self._models[plan.arm]
        settings: dict[str, float] = {
            "max_tokens": prompt.max_tokens or self._config.max_tokens,
            "temperature": self._config.temperature,
            "seed": (plan.seed + index) % 2**63,
            **({"ignore_eos": True} if prompt.ignore_eos else {}),
        }
        request = oip.ModelInferRequest(
            model_name=plan.arm,
            id=str(index),
            inputs=[_tensor(model, _PROMPT, prompt.text.encode())],
            outputs=[OutputTensor(name=name) for name in (_TEXT, _IDS)[: 1 + model.has_ids]],
        )
        request.parameters[_WANTS_FINAL].bool_param = True
        request.inputs.extend(
            _tensor(model, name, True) for name in _SWITCHES if name in model.num_dims
        )
        if _SETTINGS in model.num_dims:
            request.inputs.append(_tensor(model, _SETTINGS, json.dumps(settings).encode()))
        else:
            _add_parameters(request, settings)
        return request


def _tensor(model: _Model, name: str, value: bytes | bool) -> InputTensor:
    """Return one element, with as many dimensions as the model wants."""
    contents = (
        oip.InferTensorContents(bool_contents=[value])
        if isinstance(value, bool)
        else oip.InferTensorContents(bytes_contents=[value])
    )
    datatype = "BOOL" if isinstance(value, bool) else "BYTES"
    shape = [1] * model.num_dims[name]
    return InputTensor(name=name, datatype=datatype, shape=shape, contents=contents)


def _add_parameters(request: oip.ModelInferRequest, settings: Mapping[str, float]) -> None:
    for name, value in settings.items():
        if isinstance(value, bool):
            request.parameters[name].bool_param = value
        elif isinstance(value, int):
            request.parameters[name].int64_param = value
        else:
            request.parameters[name].double_param = value


def _index_of(response: oip.ModelInferResponse, num_samples: int) -> int:
    """Return the sample that a response belongs to: its id, as it was given."""
    if response.id.isdecimal() and int(response.id) < num_samples:
        return int(response.id)
    raise RequestFailedError("UNKNOWN", f"a response came with the id {response.id!r}")


def _take(sample: SampleRecord, response: oip.ModelInferResponse, now_s: float) -> bytes:
    """Note a response's tokens and return its text. Without ids, text counts as one token."""
    text, num_tokens = b"", 0
    has_ids = False
    for index, output in enumerate(response.outputs):
        raw = response.raw_output_contents[index] if response.raw_output_contents else None
        if output.name == _IDS:
            has_ids = True
            token_ids = _ids(output, raw)
            sample.token_ids += token_ids
            num_tokens = len(token_ids)
        elif output.name == _TEXT:
            text = _text(output, raw)
    sample.token_times_s += [now_s] * (num_tokens if has_ids else min(1, len(text)))
    if reason := response.parameters["finish_reason"].string_param:
        sample.finish_reason = reason.upper()
    return text


def _ids(output: oip.ModelInferResponse.InferOutputTensor, raw: bytes | None) -> list[int]:
    if raw is not None:
        token_ids: list[int] = np.frombuffer(raw, _ID_TYPES[output.datatype]).tolist()
        return token_ids
    contents = output.contents
    return [
        *contents.int64_contents,
        *contents.int_contents,
        *contents.uint_contents,
        *contents.uint64_contents,
    ]


def _text(output: oip.ModelInferResponse.InferOutputTensor, raw: bytes | None) -> bytes:
    if raw is not None:
        return raw[_LENGTH_BYTES:]  # of the one element that there is
    return b"".join(output.contents.bytes_contents)


def _to_failure(message: str) -> RequestFailedError:
    """Read the "CODE: text" of an error within a stream; other texts are UNKNOWN.

    >>> _to_failure("NOT_FOUND: no model").status, _to_failure("oops: no model").status
    ('NOT_FOUND', 'UNKNOWN')
    """
    code, _, text = message.partition(": ")
    if code in grpc.StatusCode.__members__:
        return RequestFailedError(code, text)
    return RequestFailedError("UNKNOWN", message)


def _judge(sample: SampleRecord, prompt: DatasetPrompt) -> None:
    """Extract and judge the answer as a Tandem server does."""
    sample.answer = canonicalise(extract(sample.text, prompt.answer_format))
    if prompt.reference_answer is not None and prompt.answer_format != "none":
        sample.is_correct = is_correct(sample.answer, prompt.reference_answer)
