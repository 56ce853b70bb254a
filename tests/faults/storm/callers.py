"""The callers of a storm: they journal what came, and say which ends are none that may be."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio

from loadtest.ledger.journal import OK, Journal
from protos.oip import grpc_service_pb2 as oip
from protos.oip import grpc_service_pb2_grpc as oip_grpc
from protos.tandem.v1 import control_pb2
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.control_pb2_grpc import ControlServiceStub
from serve.client import AsyncClient
from serve.client.channel import Endpoint
from tests.faults.storm.backend import MARK
from tests.faults.storm.plan import Act, Id, Manner, Plan

# A call that is over only by this has hung.
MAX_CALL_S = 20.0
NOT_TAKEN = "CANCELLED"
"""How calls of a drain's last moment may end, on a busy machine (R13)."""
_PAUSE_S = 0.005
_TO_ROUTE = {pb.ROLE_STUDENT: pb.ROUTE_STUDENT, pb.ROLE_TEACHER: pb.ROUTE_TEACHER}
_METHOD = "/tandem.v1.InferenceService/Generate"


class Callers:
    """Make the calls of a plan; `problems` are ends that no caller should see."""

    def __init__(self, plan: Plan, clients: dict[str, AsyncClient], journal: Journal) -> None:
        self._plan = plan
        self._clients = clients
        self._journal = journal
        self.codes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.num_requests = 0
        self.is_broken = False  # the weather: any call may fail with INTERNAL
        self.is_draining = False
        self._ids = itertools.count()

    async def call(self, act: Act) -> None:
        """Make one call, again where it was refused and the act says so."""
        for _ in range(act.num_attempts):
            code, events = await self._attempt(act)
            self._note(act, code, events)
            if code != grpc.StatusCode.RESOURCE_EXHAUSTED.name:
                return
            await asyncio.sleep(_PAUSE_S)

    async def _attempt(self, act: Act) -> tuple[str, list[Any]]:
        self.num_requests += 1
        events: list[Any] = []
        text = ""
        try:
            async with asyncio.timeout(2 * MAX_CALL_S):
                code = await self._converse(act, events)
        except grpc.RpcError as error:
            code, text = error.code().name, error.details() or ""
            self._check_innocent(act, text)
        except TimeoutError:
            code = "no end"
        was_not_taken = self.is_draining and code == NOT_TAKEN and not events
        if code not in self._allowed(act) and not was_not_taken:
            self.problems.append(f"{code} ({text}) for {act}")
        for sample in _samples(events):
            self._check_innocent(act, f"{sample.error} {sample.divergence_error}")
            is_cut = sample.finish_reason == pb.FINISH_REASON_SHUTDOWN
            may_be_cut = self.is_draining or self._needs_what_may_be_lost(sample.role)
            if is_cut and not may_be_cut:
                self.problems.append(f"a sample ended with SHUTDOWN for {act}")
        return code, events

    def _needs_what_may_be_lost(self, role_or_route: int) -> bool:
        """Say so of the remote teacher."""
        return self._plan.is_teacher_remote and role_or_route == pb.ROUTE_TEACHER

    def _check_innocent(self, act: Act, text: str) -> None:
        """Only what is NaN by itself may fail by NaN, whatever is beside it or was in its rows."""
        is_marked = self._plan.templates[act.template].prompt_token_ids.ids[0] == MARK
        if "non-finite" in text and not is_marked:
            self.problems.append(f"{text.strip()} for {act}")

    async def _converse(self, act: Act, events: list[Any]) -> str:
        client, request = self._clients[act.tenant], self._request(act)
        timeout_s = act.timeout_s if act.manner is Manner.HURRIES else MAX_CALL_S
        if act.manner is Manner.SENDS_NOTHING:
            await self._send_nothing(client)
        elif _is_compare(act):
            events.append(await client.compare(_to_compare(request), timeout_s))
        elif act.manner is Manner.LEAVES_AT_ONCE:
            client.generate(request, timeout_s).cancel()
            return "CANCELLED"
        else:
            async with client.generate(request, timeout_s) as stream:
                async for event in stream:
                    events.append(event)
                    if act.manner is Manner.LEAVES and len(events) > act.num_events:
                        return "CANCELLED"
        return OK

    async def _send_nothing(self, client: AsyncClient) -> None:
        """Half-close a call without its message."""
        call: Any = client._channel.stream_stream(_METHOD)(
            _nothing(), metadata=client._metadata, timeout=MAX_CALL_S
        )
        async for _ in call:
            pass

    def _request(self, act: Act) -> pb.GenerateRequest:
        request = pb.GenerateRequest(request_id=act.request_id)
        request.MergeFrom(self._plan.templates[act.template])
        if act.is_auto:
            request.route = pb.ROUTE_AUTO
        return request

    def _note(self, act: Act, code: str, events: Sequence[Any]) -> None:
        self.codes[code] += 1
        if act.manner is Manner.SENDS_NOTHING:
            return
        noted = self._request(act)
        noted.request_id = f"{act.number}-{next(self._ids)}"
        if act.is_auto:
            noted.route = _route_of(events)
        if events and isinstance(events[0], pb.CompareResponse):
            noted.route = pb.ROUTE_BOTH
            noted.output.CopyFrom(pb.OutputOptions(stream=False))
        self._journal.sent(noted)
        for event in events:
            # The journal knows each call by an id of its own.
            if event.HasField("usage") and event.usage.request_id == act.request_id:
                event.usage.request_id = noted.request_id
            if isinstance(event, pb.CompareResponse):
                self._journal.compared(noted.request_id, event)
            else:
                self._journal.received(noted.request_id, event)
        self._journal.ended(noted.request_id, code)

    def _allowed(self, act: Act) -> set[str]:
        """Return how a call may end."""
        if act.manner is Manner.SENDS_NOTHING:
            return {"INVALID_ARGUMENT", "UNAVAILABLE"} if self.is_draining else {"INVALID_ARGUMENT"}
        codes = {OK, "RESOURCE_EXHAUSTED"}
        if act.manner in (Manner.LEAVES, Manner.LEAVES_AT_ONCE):
            codes.add("CANCELLED")
        if act.manner is Manner.HURRIES:
            codes.add("DEADLINE_EXCEEDED")
        if act.id_kind is Id.SHARED:  # aborted, another content, or cut by who asked first
            codes |= {"CANCELLED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED"}
        if act.id_kind is Id.TWIN:
            codes.add("DEADLINE_EXCEEDED")
        if self.is_broken:
            codes.add("INTERNAL")
        route = self._request(act).route if not _is_compare(act) else pb.ROUTE_BOTH
        if self.is_draining or self._needs_what_may_be_lost(route):
            codes.add("UNAVAILABLE")
        return codes


async def _nothing() -> AsyncIterator[Any]:
    for data in list[bytes]():
        yield data


def _is_compare(act: Act) -> bool:
    return act.manner is Manner.COMPARES and act.id_kind is not Id.TWIN


def _to_compare(request: pb.GenerateRequest) -> pb.CompareRequest:
    divergence = request.divergence if request.HasField("divergence") else None
    return pb.CompareRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        divergence=divergence,
    )


def _samples(events: Sequence[Any]) -> Iterator[pb.Sample]:
    for event in events:
        if isinstance(event, pb.CompareResponse):
            yield from event.samples
        elif event.HasField("complete"):
            yield event.complete.sample


def _route_of(events: Sequence[Any]) -> pb.Route:
    """Return the route that names the model which answered."""
    for event in events:
        kind = event.WhichOneof("event")
        if kind in ("tokens", "complete"):
            part = event.tokens if kind == "tokens" else event.complete.sample
            return _TO_ROUTE[part.role]
    return pb.ROUTE_STUDENT


async def operate(endpoint: Endpoint, rng: random.Random) -> None:
    """Change the policy and abort shared ids, a hundred times a second each."""
    metadata = endpoint.metadata()
    async with endpoint.open_async() as channel:
        stub: Any = ControlServiceStub(channel)
        for number in itertools.count():
            weight = rng.choice([0.0, 0.5, 1.0])
            policy = control_pb2.SetPolicyRequest(
                student_weight=weight,
                teacher_weight=1 - weight,
                shadow_rate=rng.choice([0.0, 1.0]),
            )
            aborted = f"shared-{rng.randrange(6)}-{rng.randrange(1 + number // 20)}"
            for call in (
                stub.SetPolicy(policy, metadata=metadata),
                stub.Abort(control_pb2.AbortRequest(request_id=aborted), metadata=metadata),
            ):
                try:
                    await call
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
            await asyncio.sleep(0.01)


class Scorers:
    """Score the same completions again and again: they have the same scores, or fail."""

    def __init__(self, plan: Plan, client: AsyncClient) -> None:
        self._client = client
        rng = random.Random(f"scores {plan.seed}")
        self._requests = [
            pb.ScoreRequest(
                prompt_token_ids=pb.TokenIds(ids=rng.choices(range(4, 40), k=rng.randint(1, 30))),
                completions=[
                    pb.Completion(
                        token_ids=pb.TokenIds(ids=rng.choices(range(4, 40), k=rng.randint(1, 12)))
                    )
                    for _ in range(rng.randint(1, 6))
                ],
            )
            for _ in range(6)
        ]
        self._expected: dict[int, list[Any]] = {}
        self.problems: list[str] = []
        self.num_requests = 0
        self.is_draining = False

    async def score(self, place: int, timeout_s: float) -> None:
        """Make one call; the first one of a place says what the others must give."""
        self.num_requests += 1
        try:
            response = await self._client.score(self._requests[place], timeout_s)
        except grpc.RpcError as error:
            allowed = {"INTERNAL", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
            if error.code().name not in allowed | ({NOT_TAKEN} if self.is_draining else set()):
                self.problems.append(f"Score ended with {error.code().name}: {error.details()}")
            return
        found = [(s.role, s.index, list(s.logprobs)) for s in response.scores]
        if self._expected.setdefault(place, found) != found:
            self.problems.append(f"Score {place} has other log-probabilities than without faults")

    async def learn(self) -> None:
        for place in range(len(self._requests)):
            await self.score(place, MAX_CALL_S)
        if len(self._expected) < len(self._requests):
            self.problems.append("a Score failed in calm weather")


class Streamers:
    """Send many requests on one stream of the Open Inference Protocol: good, bad, and twice."""

    def __init__(self, client: AsyncClient, plan: Plan) -> None:
        self._client = client
        self._expected: dict[int, Any] = {}
        self.problems: list[str] = []
        self.num_requests = 0
        self.is_draining = False
        self._plan = plan

    async def stream(self, rng: random.Random, *, is_calm: bool = False) -> None:
        """Every request has one last response, with the tokens that it always has."""
        asked = list(range(8)) if is_calm else rng.choices(range(8), k=rng.randint(1, 40))
        self.num_requests += len(asked)
        stub = oip_grpc.GRPCInferenceServiceStub(self._client._channel)
        prefix = "calm" if is_calm else f"oip-{rng.randrange(50)}"
        call = stub.ModelStreamInfer(
            _each([_infer(kind, prefix) for kind in asked]),
            metadata=self._client._metadata,
            timeout=MAX_CALL_S,
        )
        is_leaving = not is_calm and rng.random() < 0.3
        finals: Counter[str] = Counter()
        try:
            async for response in call:
                self._take(response, finals)
                if is_leaving and rng.random() < 0.1:
                    call.cancel()
                    return
        except asyncio.CancelledError:
            call.cancel()
            raise
        except grpc.RpcError as error:
            # The latter is this client's own word for a write on a stream that had ended.
            is_own = error.details() == "Internal error from Core"
            allowed = {"UNAVAILABLE", NOT_TAKEN} if self.is_draining else {"UNAVAILABLE"}
            if error.code().name not in allowed and not is_own:
                self.problems.append(f"a stream ended with {error.code().name}: {error.details()}")
            return
        wanted = Counter(str(kind) for kind in asked)
        if finals != wanted:
            self.problems.append(f"a stream had last responses {finals}, not {wanted}")

    def _take(self, response: Any, finals: Counter[str]) -> None:
        infer = response.infer_response
        if infer.parameters["triton_final_response"].bool_param:
            finals[infer.id] += 1
        if response.error_message:
            code = response.error_message.partition(":")[0]
            is_bad = infer.id in "67"
            allowed = {"INVALID_ARGUMENT"} if is_bad else {
                "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED",
            }  # fmt: skip
            if code not in allowed:
                self.problems.append(f"{response.error_message} for {infer.id} of a stream")
            return
        found = [list(output.contents.int64_contents) for output in infer.outputs][:1]
        if "finish_reason" not in infer.parameters:
            return
        reason = infer.parameters["finish_reason"].string_param
        is_whole = reason in ("stop", "length")
        if is_whole and self._expected.setdefault(int(infer.id), found) != found:
            self.problems.append(f"request {infer.id} of a stream has other tokens")


async def _each(requests: list[Any]) -> AsyncIterator[Any]:
    for request in requests:
        yield request


def _infer(kind: int, prefix: str) -> oip.ModelInferRequest:
    """Return request `kind` of a stream; the last two are none."""
    ids = [7] * (3 * kind + 1)
    parameters = {
        "max_tokens": oip.InferParameter(int64_param=4 + kind if kind != 6 else -1),
        "seed": oip.InferParameter(int64_param=kind),
        "temperature": oip.InferParameter(double_param=1.0),
        "request_id": oip.InferParameter(string_param=f"{prefix}-{kind}"),
        "stream": oip.InferParameter(bool_param=False),
    }
    tensor = oip.ModelInferRequest.InferInputTensor(
        name="input_ids" if kind != 7 else "no_such_input",
        datatype="INT64",
        shape=[len(ids)],
        contents=oip.InferTensorContents(int64_contents=ids),
    )
    return oip.ModelInferRequest(
        model_name=("student", "teacher")[kind % 2], id=str(kind), inputs=[tensor],
        parameters=parameters,
    )  # fmt: skip
