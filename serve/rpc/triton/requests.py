"""Requests of the Open Inference Protocol as our own, and our events as its responses.

Only forms are checked here; what is allowed is up to `serve.rpc.validation`, whose field paths are
translated back to where the client gave the value: "inputs[top_p]", "parameters[top_p]".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from protos.oip import grpc_service_pb2 as oip
from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import FieldViolation, InvalidFieldError, TooLargeError
from serve.pair.served import Role
from serve.rpc.checks import shown
from serve.rpc.triton.models import OUTPUTS, VERSION, to_role
from serve.rpc.triton.settings import MAX_UINT32, PROMPTS, InferSettings, read_text, unknown_name
from serve.rpc.triton.tensors import Tensor, check_no_parameters, read_inputs, write_output

_DEFAULT_OUTPUTS = ("output_ids", "text_output", "logprobs")
FINAL = "triton_final_response"


@dataclass(frozen=True, slots=True)
class Inference:
    """A request in our terms, and what its responses need.

    `outputs` in the order asked for; `prefix` stands before the text; `places` says where the
    client gave a setting.
    """

    source: oip.ModelInferRequest
    request: pb.GenerateRequest
    outputs: tuple[str, ...]
    prefix: str
    timeout_s: float | None
    wants_empty_final: bool
    places: Mapping[str, str]

    @contextmanager
    def fields_as_given(self) -> Iterator[None]:
        """Have errors of the block name fields as the client knows them."""
        try:
            yield
        except InvalidFieldError as error:
            raise InvalidFieldError(
                *(FieldViolation(self._place(v.field), v.description) for v in error.violations)
            ) from error
        except TooLargeError as error:
            # A copy: everyone who asked for the same run gets the same error.
            placed = TooLargeError(str(error))
            placed.field = self._place(error.field)
            raise placed from error

    def respond(
        self,
        token_ids: Sequence[int] | None,
        text: str | None,
        logprobs: Sequence[float] | None,
        k3: Sequence[float] | None = None,
    ) -> oip.ModelInferResponse:
        """Return a response with the outputs asked for, without those that are None."""
        values = {
            "output_ids": token_ids,
            "text_output": None if text is None else [text.encode()],
            "logprobs": logprobs,
            "k3": k3,
        }
        response = self.respond_empty()
        for name in self.outputs:
            if (found := values[name]) is not None:
                write_output(response, name, OUTPUTS[name], found)
        return response

    def respond_last(self, sample: pb.Sample, prefix: str) -> oip.ModelInferResponse:
        """Return what is left to say of a completion: all of it, if it was not streamed.

        A client that is told by an empty response gets no outputs without tokens: tools count
        every response with outputs as one with tokens.
        """
        k3 = sample.divergence.per_token_k3 if sample.HasField("divergence") else None
        if not self.request.output.stream:
            response = self.respond(sample.token_ids, prefix + sample.text, sample.logprobs, k3)
        elif self.wants_empty_final:
            response = self.respond(None, prefix or None, None, k3)
        else:
            response = self.respond((), prefix, (), k3)
        reason = pb.FinishReason.Name(sample.finish_reason).removeprefix("FINISH_REASON_")
        response.parameters["finish_reason"].string_param = reason.lower()
        if sample.divergence_error:
            response.parameters["divergence_error"].string_param = sample.divergence_error
        return response

    def respond_empty(self) -> oip.ModelInferResponse:
        """Return a response without outputs."""
        return oip.ModelInferResponse(
            model_name=self.source.model_name, model_version=VERSION, id=self.source.id
        )

    def _place(self, field: str) -> str:
        """Return where a field of our request came from; the index of a list's element stays."""
        match = re.fullmatch(r"(.*?)((?:\[\d+\])?)", field)
        assert match is not None
        name, index = match.groups()
        setting = name.removeprefix("sampling.")
        return self.places.get(setting, f"parameters[{setting}]") + index


def to_inference(
    source: oip.ModelInferRequest, *, may_stream: bool, max_elements: int
) -> Inference:
    """Translate a request, whose tensors may have so many elements each.

    Raises:
        TooManyTokensError: a tensor has more.
        InvalidFieldError: a name is not known, or a value has the wrong form.
        ModelNotLoadedError: there is no such model, or no such version.
    """
    role = to_role(source.model_name, source.model_version)
    tensors = read_inputs(source, max_elements)
    settings = InferSettings(source, tensors)
    outputs = _outputs(source, settings)
    prompt, prefix = _prompt(tensors, settings)
    is_streamed = settings.get("stream", may_stream)
    if is_streamed and not may_stream:
        raise InvalidFieldError.of(
            settings.places["stream"], "is true; must be false in ModelInfer; ask ModelStreamInfer"
        )
    wants_k3 = "k3" in outputs
    request = pb.GenerateRequest(
        request_id=settings.get("request_id", ""),
        route=pb.ROUTE_TEACHER if role is Role.TEACHER else pb.ROUTE_STUDENT,
        sampling=settings.sampling(),
        divergence=pb.DivergenceOptions(enabled=wants_k3, per_token=wants_k3),
        output=pb.OutputOptions(stream=is_streamed),
        **prompt,
    )
    return Inference(
        source=source,
        request=request,
        outputs=outputs,
        prefix=prefix,
        timeout_s=settings.get("timeout", 0) / 1e6 or None,
        wants_empty_final=settings.get("triton_enable_empty_final_response", False),
        places=settings.places,
    )


def _outputs(source: oip.ModelInferRequest, settings: InferSettings) -> tuple[str, ...]:
    if len(source.outputs) > len(OUTPUTS):
        raise InvalidFieldError.of(
            "outputs", f"has {len(source.outputs)} of them; there are only {', '.join(OUTPUTS)}"
        )
    for output in source.outputs:
        path = f"outputs[{shown(output.name)}]"
        if output.name not in OUTPUTS:
            raise unknown_name(path, OUTPUTS)
        check_no_parameters(path, output.parameters)
    names = dict.fromkeys(output.name for output in source.outputs)
    if not settings.get("divergence", True):
        names.pop("k3", None)
    return tuple(names) if source.outputs else _DEFAULT_OUTPUTS


def _prompt(tensors: Mapping[str, Tensor], settings: InferSettings) -> tuple[dict[str, Any], str]:
    """Return the prompt as a field of our request, and what of it goes into the text."""
    given = [name for name in PROMPTS if name in tensors]
    if len(given) != 1:
        raise InvalidFieldError.of(
            f"inputs[{given[0] if given else 'text_input'}]",
            f"{' and '.join(given) if given else 'no prompt'} given; must be exactly one of "
            f"{' and '.join(PROMPTS)}",
        )
    tensor = tensors[given[0]]
    if tensor.datatype != PROMPTS[tensor.name]:
        raise InvalidFieldError.of(
            tensor.path, f"has datatype {tensor.datatype}; must be {PROMPTS[tensor.name]}"
        )
    has_prefix = not settings.get("exclude_input_in_output", True)
    if tensor.name == "text_input":
        text = _text(tensor)
        return {"prompt": text}, text if has_prefix else ""
    if has_prefix:
        raise InvalidFieldError.of(
            settings.places["exclude_input_in_output"], "is false; must be true with input_ids"
        )
    return {"prompt_token_ids": pb.TokenIds(ids=_token_ids(tensor))}, ""


def _text(tensor: Tensor) -> str:
    values = tensor.values
    if len(values) != 1:
        raise InvalidFieldError.of(tensor.path, f"has {len(values)} texts; must have one")
    try:
        return read_text(values[0])
    except ValueError as allowed:
        raise InvalidFieldError.of(tensor.path, f"must be {allowed}") from None


def _token_ids(tensor: Tensor) -> list[int]:
    """Return ids that our message can hold; which of them there are is checked behind it."""
    ids = tensor.values
    if ids and (min(ids) < 0 or max(ids) > MAX_UINT32):
        index = next(i for i, token_id in enumerate(ids) if not 0 <= token_id <= MAX_UINT32)
        raise InvalidFieldError.of(
            f"{tensor.path}[{index}]", f"is {ids[index]}; must be 0 to {MAX_UINT32}"
        )
    return ids
