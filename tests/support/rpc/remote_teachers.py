"""Students whose teacher another server answers for, and servers that are no teacher."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from protos.tandem.v1 import inference_pb2 as pb
from serve.addresses import RemoteAddress
from serve.client.channel import Endpoint
from serve.pair.remote_teacher import RemoteTeacher
from serve.pair.served import Engines, Role, ServedModel
from tests.support.polling import wait_until

SAMPLING = pb.SamplingParams(num_samples=3, seed=5, max_tokens=12)
NOWHERE = "127.0.0.1:1"
CANCELLED = {13: "as a server that closes", 14: "the request was aborted by an operator"}
"""By seed: what a server says of a call that it cancels."""
COMPARE = pb.CompareRequest(
    request_id="c",
    prompt="1 + 1 = ",
    sampling=pb.SamplingParams(
        num_samples=3, seed=5, max_tokens=12, temperature=0.8, top_p=0.95, stop=["7"],
        repetition_penalty=1.05,
    ),
    divergence=pb.DivergenceOptions(per_token=True),
    evaluation=pb.EvaluationOptions(answer_format="last_number", pass_at_k=[1]),
    output=pb.OutputOptions(top_logprobs=2, processed_logprobs=True),
)  # fmt: skip
SCORE = pb.ScoreRequest(
    prompt="1 + 1 = ",
    request_id="s",
    temperature=0.7,
    completions=[pb.Completion(text="2"), pb.Completion(text="11 and more")],
)


class RemoteTeachers:
    """Starts teachers alone, and students whose teacher is at an address."""

    def __init__(self, serving: Any, make_pair: Any, tokenizer: Any, stack: ExitStack) -> None:
        self._serving, self._make_pair, self._stack = serving, make_pair, stack
        self._tokenizer = tokenizer
        self.logits = make_pair().backends[Role.TEACHER].logits

    def teacher(self, **settings: Any) -> Any:
        pair = self._make_pair(teacher=self.logits, roles=(Role.TEACHER,))
        return self._stack.enter_context(self._serving(pair, **settings))

    @contextmanager
    def passing_teacher(self, **settings: Any) -> Iterator[Any]:
        pair = self._make_pair(teacher=self.logits, roles=(Role.TEACHER,))
        with self._serving(pair, **settings) as live:
            yield live

    def student(
        self, address: str, open_endpoint: Callable[[], Endpoint] | None = None, **settings: Any
    ) -> Any:
        pair = self._make_pair(roles=(Role.STUDENT,))
        target = RemoteAddress.parse(f"grpc://{address}").target
        engine = RemoteTeacher(
            f"grpc://{address}",
            open_endpoint or (lambda: Endpoint(target, max_attempts=2)),
            tokenizer_hash=self._tokenizer.hash,
            scoring_timeout_s=20,
            on_call=lambda rpc, code: pair.metrics.remote_calls.labels(rpc, code).inc(),
            probe_period_s=0.05,
        )
        teacher = ServedModel(Role.TEACHER, engine, self._tokenizer, address=f"grpc://{address}")
        pair.engines = Engines(pair.engines.student, teacher)
        return self._stack.enter_context(self._serving(pair, **settings))


def is_up(live: Any) -> bool:
    return bool(live.pair.value("model_up", role="teacher"))


def reached(live: Any) -> Any:
    wait_until(lambda: is_up(live), what="the connection to the teacher")
    return live


def why_lost(live: Any) -> str:
    """Return what a student's server says to a request for its lost teacher."""
    try:
        live.client.generate(pb.GenerateRequest(prompt="x", route=pb.ROUTE_TEACHER)).result()
    except grpc.RpcError as error:
        return str(error.details())
    return ""


def check_student_alone(live: Any) -> None:
    """Check that what needs no teacher has no error, and what needs it says so."""
    (sample,) = (
        live.client.generate(pb.GenerateRequest(prompt="x", sampling={"seed": 1})).result().samples
    )
    assert sample.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
    assert "the teacher" in sample.divergence_error and not sample.HasField("divergence")
    both = live.client.compare(pb.CompareRequest(prompt="x", sampling=SAMPLING)).samples
    assert [s.finish_reason == pb.FINISH_REASON_ERROR for s in both] == [False] * 3 + [True] * 3
    assert all("the teacher" in sample.error for sample in both[3:])


@contextmanager
def lying_server(loop: asyncio.AbstractEventLoop, tokenizer_hash: str) -> Iterator[str]:
    """Yield the address of a server whose answers fit no request."""

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        model = pb.Model(role=pb.ROLE_TEACHER, tokenizer_hash=tokenizer_hash)

        async def models(request: Any, context: Any) -> Any:
            return pb.GetModelsResponse(models=[model])

        async def score(request: Any, context: Any) -> Any:
            return pb.ScoreResponse()

        async def generate(request: Any, context: Any) -> Any:
            if text := CANCELLED.get(request.sampling.seed):
                await context.abort(grpc.StatusCode.CANCELLED, text)
            yield pb.GenerateResponse(tokens=pb.TokenChunk(index=9, token_ids=[1], logprobs=[0.0]))

        async def check(request: Any, context: Any) -> Any:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

        def unary(method: Any, kind: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                method, kind.FromString, lambda message: message.SerializeToString()
            )

        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "tandem.v1.InferenceService",
                    {
                        "GetModels": unary(models, pb.GetModelsRequest),
                        "Score": unary(score, pb.ScoreRequest),
                        "Generate": grpc.unary_stream_rpc_method_handler(
                            generate,
                            pb.GenerateRequest.FromString,
                            lambda message: message.SerializeToString(),
                        ),
                    },
                ),
                grpc.method_handlers_generic_handler(
                    "grpc.health.v1.Health", {"Check": unary(check, health_pb2.HealthCheckRequest)}
                ),
            )
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield f"127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
