"""A journal of calls: what a client is about to send, then everything that came back, a line each.

Lines are JSON objects with the request's `id` and an `event`:

    sent       before the call: rpc, seed, prompt_sha256, what (a hash of the request but for its
               id: equal requests have equal answers), and of a whole answer roles, num_samples,
               max_tokens (null: not asked for), streams, and what is said of its answers, in vote
    tokens     a chunk: role, index, position, token_ids, logprobs, text
    sample     a whole sample: role, index, finish_reason, token_ids, logprobs, text, answer,
               correct, divergence or null, divergence_error
    agreement  student and teacher (a vote or null each), same_answer, pass@k of both
    usage      the last message of a whole answer: request_id, seed, completion_tokens by role
    end        the call is over: code, the gRPC status

Each line is handed to the system as it is written: what a killed client had written is there.
`loadtest.ledger.ledger` reads it. Score has no journal: nothing is sampled there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import AsyncIterable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from bundle.errors import UserError
from loadtest.ledger.journal_events import check_event
from protos.tandem.v1 import inference_pb2 as pb

OK = grpc.StatusCode.OK.name
_SUFFIX = ".jsonl"
AnyRequest = pb.GenerateRequest | pb.CompareRequest

_ROLES = {pb.ROLE_STUDENT: "student", pb.ROLE_TEACHER: "teacher"}
_BOTH = ["student", "teacher"]
_ROUTES = {
    pb.ROUTE_STUDENT: ["student"],
    pb.ROUTE_TEACHER: ["teacher"],
    pb.ROUTE_BOTH: _BOTH,
}
_EXACT = (pb.ANSWER_MATCH_UNSPECIFIED, pb.ANSWER_MATCH_EXACT)
_COUNTS = ("num_tokens", "nonfinite_tokens", "large_ratio_tokens")
_SUMS = ("k1_sum", "k2_sum", "k3_sum")
_MAYBE = ("k1_mean", "k2_mean", "k3_mean", "max_abs_log_ratio")
DIVERGENCE_FIELDS = (*_COUNTS, *_SUMS, *_MAYBE)


class Journal:
    """Writes one file of lines, which may be shared by the calls of one event loop or thread.

    UserError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._told():
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def sent(self, request: AnyRequest) -> None:
        """Note a request that has an id, a seed and a route other than AUTO; ValueError else."""
        sampling = request.sampling
        if not request.request_id or not sampling.HasField("seed"):
            raise ValueError("a journal needs requests with request_id and sampling.seed")
        roles = _BOTH if isinstance(request, pb.CompareRequest) else _ROUTES.get(request.route)
        if roles is None:
            raise ValueError("a journal needs a route that names the models")
        self._write(
            request.request_id,
            "sent",
            rpc=request.DESCRIPTOR.name.removesuffix("Request"),
            seed=sampling.seed,
            prompt_sha256=_prompt_hash(request),
            what=_hash_but_for_the_id(request),
            roles=roles,
            num_samples=sampling.num_samples if sampling.HasField("num_samples") else 1,
            max_tokens=_given(sampling, "max_tokens"),
            streams=_is_streamed(request),
            vote=_vote_asked_for(request.evaluation),
        )

    def received(self, request_id: str, response: pb.GenerateResponse) -> None:
        """Note a message of a Generate stream."""
        match response.WhichOneof("event"):
            case "tokens":
                chunk = response.tokens
                self._write(
                    request_id,
                    "tokens",
                    role=_ROLES[chunk.role],
                    index=chunk.index,
                    position=chunk.position,
                    token_ids=list(chunk.token_ids),
                    logprobs=list(chunk.logprobs),
                    text=chunk.text,
                )
            case "complete":
                self._sample(request_id, response.complete.sample)
            case "agreement":
                self._agreement(request_id, response.agreement)
            case "usage":
                self._usage(request_id, response.usage)

    def compared(self, request_id: str, response: pb.CompareResponse) -> None:
        """Note the answer of a Compare."""
        for sample in response.samples:
            self._sample(request_id, sample)
        if response.HasField("agreement"):
            self._agreement(request_id, response.agreement)
        if response.HasField("usage"):
            self._usage(request_id, response.usage)

    def ended(self, request_id: str, code: str) -> None:
        """Note the status with which the call ended."""
        self._write(request_id, "end", code=code)

    async def follow(
        self, request: pb.GenerateRequest, responses: AsyncIterable[pb.GenerateResponse]
    ) -> str:
        """Note a whole Generate call, and return its status; `sent` was called before it."""
        code = OK
        try:
            async for response in responses:
                self.received(request.request_id, response)
        except grpc.RpcError as error:
            code = error.code().name
        self.ended(request.request_id, code)
        return code

    def _sample(self, request_id: str, sample: pb.Sample) -> None:
        self._write(
            request_id,
            "sample",
            role=_ROLES[sample.role],
            index=sample.index,
            finish_reason=pb.FinishReason.Name(sample.finish_reason),
            token_ids=list(sample.token_ids),
            logprobs=list(sample.logprobs),
            text=sample.text,
            answer=_given(sample, "answer"),
            correct=_given(sample, "correct"),
            divergence=_divergence(sample) if sample.HasField("divergence") else None,
            divergence_error=sample.divergence_error,
        )

    def _agreement(self, request_id: str, agreement: pb.Agreement) -> None:
        votes = {role: _given(agreement, role) for role in _BOTH}
        self._write(
            request_id,
            "agreement",
            **{role: None if vote is None else _vote(vote) for role, vote in votes.items()},
            same_answer=_given(agreement, "same_answer"),
            **{f"{r}_pass_at_k": dict(getattr(agreement, f"{r}_pass_at_k")) for r in _BOTH},
        )

    def _usage(self, request_id: str, usage: pb.Usage) -> None:
        self._write(
            request_id,
            "usage",
            request_id=usage.request_id,
            seed=usage.seed,
            completion_tokens={_ROLES[r.role]: r.completion_tokens for r in usage.roles},
        )

    def _write(self, request_id: str, event: str, /, **fields: Any) -> None:
        with self._told():
            self._file.write(json.dumps({"id": request_id, "event": event, **fields}) + "\n")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        with suppress(OSError):  # told by the write, which leaves nothing to be written
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _divergence(sample: pb.Sample) -> dict[str, Any]:
    """Return what was reported, and the log-probabilities that it can be computed from again."""
    divergence = sample.divergence
    return {
        **{name: getattr(divergence, name) for name in (*_COUNTS, *_SUMS)},
        **{name: _given(divergence, name) for name in _MAYBE},
        "reference_logprobs": list(divergence.reference_logprobs),
    }


def _vote(vote: pb.Vote) -> dict[str, Any]:
    numbers = {name: getattr(vote, name) for name in ("num_valid", "num_samples", "tie")}
    return {"answer": _given(vote, "answer"), "share": _given(vote, "share"), **numbers}


def _given(message: Message, name: str) -> Any:
    """Return a field; None where it is unset."""
    return getattr(message, name) if message.HasField(name) else None


def _is_streamed(request: AnyRequest) -> bool:
    if isinstance(request, pb.CompareRequest):
        return False
    return request.output.stream if request.output.HasField("stream") else True


def _vote_asked_for(evaluation: pb.EvaluationOptions) -> str:
    """Return "none", "exact" (answers are the same where their texts are), "gold" or "other"."""
    if not evaluation.HasField("answer_format") or evaluation.answer_format == "none":
        return "none"
    if evaluation.answer_match not in _EXACT:
        return "other"
    return "gold" if evaluation.HasField("reference_answer") else "exact"


def _prompt_hash(request: AnyRequest) -> str:
    """Return the SHA-256 of the prompt in the form that it was given in."""
    name = request.WhichOneof("input")
    prompt: Any = getattr(request, name) if name else ""
    data = prompt.encode() if isinstance(prompt, str) else prompt.SerializeToString()
    return hashlib.sha256(data).hexdigest()


def _hash_but_for_the_id(request: AnyRequest) -> str:
    same = type(request).FromString(request.SerializeToString())
    same.ClearField("request_id")
    name = request.DESCRIPTOR.name.encode()
    return hashlib.sha256(name + same.SerializeToString(deterministic=True)).hexdigest()


def journal_file(folder: Path, run_id: str, process: int) -> Path:
    """Return the journal of a client process of a load test; the folder may be that of many."""
    return folder / f"{run_id}.{process}{_SUFFIX}"


def read_journal(paths: Iterable[Path]) -> Iterable[dict[str, Any]]:
    """Yield the events of journals, one journal after the other; of a folder all that are in it.

    Raises:
        ValueError: a line is no event, with its place, or a folder has no journal. The last line of
            a file may be cut, as a killed client leaves it, and is left out.
    """
    for path in itertools.chain.from_iterable(map(_files_of, paths)):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                yield _event_of(line, f"{path}, line {number}")


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (found := sorted(path.glob(f"*{_SUFFIX}"))):
        raise ValueError(f"{path} has no journal: no file *{_SUFFIX}")
    return found


def _event_of(line: bytes, place: str) -> dict[str, Any]:
    try:
        event: dict[str, Any] = json.loads(line.decode())
        check_event(event)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{place} is no event: {line[:80].rstrip()!r}") from None
    return event
