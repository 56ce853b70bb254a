"""`tandem.v1.InferenceService` on the wire: messages in, messages out, nothing decided in between.

Calls arrive as raw bytes, because grpcio answers bytes that it cannot parse with UNKNOWN and a
Python text.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import ModelsNotComparableError
from serve.pair.arm import ArmResult, SampleChunk
from serve.pair.coordinator import Coordinator
from serve.pair.request import GenerationSpec, ScoreSpec
from serve.rpc import replies
from serve.rpc.calls import Call, CallGuard, Context, streaming, unary
from serve.rpc.decoding import parse
from serve.rpc.replay import Admit, Emit, Replays, Run, RunKey, admit_all
from serve.rpc.validation import validate_compare, validate_generate, validate_score

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceService:
    """Translates between messages and a `Coordinator`; lives on one asyncio loop."""

    def __init__(self, coordinator: Coordinator, guard: CallGuard, replays: Replays) -> None:
        self._coordinator = coordinator
        self._limits = coordinator.limits
        self._guard = guard
        self._replays = replays

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        methods = {
            "Generate": (streaming, self._generate),
            "Compare": (unary, self._compare),
            "Score": (unary, self._score),
            "GetModels": (unary, self._get_models),
        }
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                rpc: make(self._guard.surround(rpc, method))
                for rpc, (make, method) in methods.items()
            },
        )

    async def generate(
        self, call: Call, request: pb.GenerateRequest
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Yield the responses to a request; close the iterator to give up on it.

        Raises:
            TandemError: the request is refused, or cannot be served.
        """
        spec = validate_generate(request, self._limits)
        call.label(spec)

        async def run(emit: Emit) -> bool:
            return await self._fill(emit, call, spec)

        admit = partial(self._coordinator.check_room, spec)
        async with aclosing(self._follow(call, request, spec, run, admit)) as responses:
            async for response in responses:
                yield response

    async def _generate(self, call: Call, data: bytes, context: Context) -> None:
        responses = self.generate(call, parse(data, pb.GenerateRequest))
        async with aclosing(responses):
            async for response in responses:
                await self._guard.write(context, response)

    async def _fill(self, emit: Emit, call: Call, spec: GenerationSpec) -> bool:
        """Emit responses as they come from all arms; returns whether nothing in them failed."""

        def on_chunk(chunk: SampleChunk) -> None:
            if spec.output.stream:
                emit(replies.to_chunk(chunk, spec))

        def on_arm(arm: ArmResult) -> None:
            for sample in arm.samples:
                complete = pb.Complete(sample=replies.to_sample(sample, spec))
                emit(pb.GenerateResponse(complete=complete))

        answer = await self._coordinator.answer(
            spec,
            on_chunk,
            on_arm,
            deadline_s=call.deadline_s,
            tenant=call.tenant,
            peer=call.peer,
        )
        if answer.agreement is not None:
            emit(pb.GenerateResponse(agreement=replies.to_agreement(answer.agreement)))
        usage = replies.to_usage(spec, answer.arms, call.seconds)
        emit(pb.GenerateResponse(usage=usage))
        return answer.is_whole

    async def _compare(self, call: Call, data: bytes, context: Context) -> pb.CompareResponse:
        request = parse(data, pb.CompareRequest)
        spec = validate_compare(request, self._limits)
        call.label(spec)
        loaded = self._coordinator.engines.loaded
        if len(loaded) < 2:
            raise ModelsNotComparableError(f"only the {loaded[0].role.value} is loaded")

        async def run(emit: Emit) -> bool:
            answer = await self._coordinator.answer(
                spec,
                _ignore,
                _ignore,
                deadline_s=call.deadline_s,
                tenant=call.tenant,
                peer=call.peer,
            )
            emit(
                pb.CompareResponse(
                    samples=[
                        replies.to_sample(s, spec) for arm in answer.arms for s in arm.samples
                    ],
                    agreement=replies.to_agreement(answer.agreement) if answer.agreement else None,
                    usage=replies.to_usage(spec, answer.arms, call.seconds),
                )
            )
            return answer.is_whole

        admit = partial(self._coordinator.check_room, spec)
        response: pb.CompareResponse = await self._only_response(call, request, spec, run, admit)
        return response

    async def _score(self, call: Call, data: bytes, context: Context) -> pb.ScoreResponse:
        request = parse(data, pb.ScoreRequest)
        spec = validate_score(request, self._limits)
        call.request_id = spec.request_id

        async def run(emit: Emit) -> bool:
            answer = await self._coordinator.score(
                spec, deadline_s=call.deadline_s, tenant=call.tenant, peer=call.peer
            )
            emit(
                pb.ScoreResponse(
                    scores=[replies.to_score(score, spec) for score in answer.scores],
                    usage=replies.to_score_usage(spec, answer.requests, call.seconds),
                )
            )
            return True

        response: pb.ScoreResponse = await self._only_response(call, request, spec, run)
        return response

    async def _get_models(self, call: Call, data: bytes, context: Context) -> pb.GetModelsResponse:
        parse(data, pb.GetModelsRequest)
        loaded = self._coordinator.engines.loaded
        return pb.GetModelsResponse(models=[replies.to_model(model) for model in loaded])

    async def _only_response(
        self,
        call: Call,
        request: Any,
        spec: GenerationSpec | ScoreSpec,
        run: Run,
        admit: Admit = admit_all,
    ) -> Any:
        async with aclosing(self._follow(call, request, spec, run, admit)) as responses:
            (response,) = [response async for response in responses]
        return response

    def _follow(
        self,
        call: Call,
        request: Any,
        spec: GenerationSpec | ScoreSpec,
        run: Run,
        admit: Admit,
    ) -> AsyncGenerator[Any, None]:
        """Run the request, or follow the run of the same one, which only a given id can name."""
        key = RunKey(call.tenant, spec.request_id)
        return self._replays.follow(
            key,
            _digest(request),
            run,
            is_kept=bool(request.request_id),
            deadline_s=call.deadline_s,
            admit=admit,
        )


def _digest(request: Message) -> bytes:
    """Return what tells requests apart: of different types, or in any field."""
    data = request.SerializeToString(deterministic=True)
    return hashlib.sha256(request.DESCRIPTOR.name.encode() + b"\0" + data).digest()


def _ignore(part: SampleChunk | ArmResult) -> None:
    """Compare returns everything at its end."""
