"""What a remote server answers, and how its calls end: events or one error; a text to show."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from bundle.errors import UserError
from protos.tandem.v1 import inference_pb2 as pb
from serve.client.channel import Attempts, RetryBudget
from serve.client.failures import PUSHBACK_KEY, explain, retry_delay_s
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import Event, FinishedEvent, FinishReason, TokenEvent
from serve.errors import EngineFailedError, QueueFullError
from serve.pair.remote_messages import ROLE, AnswerEvents, from_score
from serve.pair.remote_teacher import teacher_of
from serve.rpc.statuses import status_of

NUM_SAMPLES, TIMEOUT_S = 2, 1e6
DETAILS_KEY = "grpc-status-details-bin"
SCORING = ScoringRequest(
    request_id="x", prompt_token_ids=(1,), completions=((2, 3), (4,)), temperature=1.0
)


class Ended(grpc.RpcError):
    """A call that the server ended."""

    def __init__(self, code: grpc.StatusCode, key: str, value: str | bytes) -> None:
        super().__init__()
        self._code, self._metadata = code, ((key, value),)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "said"

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata


def generate(data: bytes) -> None:
    """Take responses, each behind a byte with its length: every sample ends once."""
    answer, events = AnswerEvents(NUM_SAMPLES), list[Event]()
    with contextlib.suppress(DecodeError, EngineFailedError):
        while data:
            events += answer.take(pb.GenerateResponse.FromString(data[1 : 1 + data[0]]))
            data = data[1 + data[0] :]
    events += answer.end(FinishReason.ERROR, "lost")
    ends = [event for event in events if isinstance(event, FinishedEvent)]
    assert sorted(event.index for event in ends) == list(range(NUM_SAMPLES)), ends
    for end in ends:
        came = [e for e in events if isinstance(e, TokenEvent) and e.index == end.index]
        assert [event.position for event in came] == list(range(len(came))), came
        assert tuple(event.token_id for event in came) == end.token_ids, end
        assert len(end.logprobs) == len(end.processed_logprobs) == len(end.token_ids), end


def score(data: bytes) -> None:
    """Take the scores of a request."""
    with contextlib.suppress(DecodeError, EngineFailedError):
        found = from_score(pb.ScoreResponse.FromString(data), SCORING)
        assert [len(each.logprobs) for each in found] == [2, 1], found


def models(data: bytes) -> None:
    """Look for the teacher among models."""
    try:
        assert teacher_of(pb.GetModelsResponse.FromString(data), "abc").tokenizer_hash == "abc"
    except UserError as error:
        assert str(error).isprintable(), error
    except DecodeError:
        pass


def ended(data: bytes) -> None:
    """Explain a call that ended with these details; code and text are those of the call."""
    with contextlib.suppress(DecodeError):
        status = status_pb2.Status.FromString(data)
        status.code, status.message = grpc.StatusCode.INVALID_ARGUMENT.value[0], "said"
        data = status.SerializeToString()
    error = Ended(grpc.StatusCode.INVALID_ARGUMENT, DETAILS_KEY, data)
    assert all(line.isprintable() for line in explain(error).split("\n")), explain(error)
    delay_s = retry_delay_s(error)
    assert delay_s is None or math.isfinite(delay_s), delay_s


def pushed_back(data: bytes) -> None:
    """Ask for the pause behind a refusal, as text of what HTTP/2 can carry."""
    error = Ended(grpc.StatusCode.UNAVAILABLE, PUSHBACK_KEY, data.decode("latin-1"))
    for timeout_s in (None, TIMEOUT_S):
        pause_s = Attempts(2, RetryBudget(), timeout_s).pause_s(error)
        assert pause_s is None or 0 <= pause_s <= TIMEOUT_S * 10, pause_s


KINDS: tuple[Callable[[bytes], None], ...] = (generate, score, models, ended, pushed_back)


def check(data: bytes) -> None:
    """Treat the first byte as the kind of what came; raises where something is wrong."""
    if data:
        KINDS[data[0] % len(KINDS)](data[1:])


def _framed(*responses: pb.GenerateResponse) -> bytes:
    messages = [response.SerializeToString() for response in responses]
    return b"".join(bytes([len(message)]) + message for message in messages)


def _answer() -> Iterator[pb.GenerateResponse]:
    for index in range(NUM_SAMPLES):
        top = pb.TopLogprobs(entries=[pb.TopLogprob(token_id=5, logprob=-1.0)])
        chunk = pb.TokenChunk(
            role=ROLE, index=index, position=0, token_ids=[5], logprobs=[-1.0], top_logprobs=[top]
        )
        yield pb.GenerateResponse(tokens=chunk)
        sample = pb.Sample(
            role=ROLE, index=index, token_ids=[5], logprobs=[-1.0], processed_logprobs=[-1.0],
            finish_reason=pb.FINISH_REASON_STOP,
        )  # fmt: skip
        yield pb.GenerateResponse(complete=pb.Complete(sample=sample))
    yield pb.GenerateResponse(usage=pb.Usage(roles=[pb.RoleUsage(cached_prompt_tokens=1)]))


def seeds() -> Iterator[bytes]:
    """Yield a whole answer of each kind, and answers that stop or begin too early."""
    answer = list(_answer())
    for responses in (answer, answer[:3], answer[1:], answer[::-1], [*answer[:2], answer[1]]):
        yield bytes([KINDS.index(generate)]) + _framed(*responses)
    scores = [
        pb.Score(role=ROLE, index=index, token_ids=ids, logprobs=[-1.0] * len(ids))
        for index, ids in enumerate(SCORING.completions)
    ]
    for some in (scores, scores[:1]):
        yield bytes([KINDS.index(score)]) + pb.ScoreResponse(scores=some).SerializeToString()
    for name in ("abc", "a\nb"):
        model = pb.Model(role=ROLE, tokenizer_hash=name)
        message = pb.GetModelsResponse(models=[model]).SerializeToString()
        yield bytes([KINDS.index(models)]) + message
    refusal = status_of(QueueFullError("full", 1.5))
    for key, value in refusal.trailing_metadata():
        kind = ended if key == DETAILS_KEY else pushed_back
        yield bytes([KINDS.index(kind)]) + (value if isinstance(value, bytes) else value.encode())
    for text in (b"-1", b"0", b"9" * 400, b"9" * 5000, b"1e3", b"\xb2"):
        yield bytes([KINDS.index(pushed_back)]) + text
