"""A journal of calls: what a client is about to send, then everything that came back, a line each.

Lines are JSON objects with the request's `id` and an `event`:

    sent    before the call: rpc, seed, prompt_sha256, what (a hash of the request but for its id:
            equal requests have equal answers), roles and num_samples that a whole answer has
    tokens  a chunk: role, index, position, token_ids
    sample  a whole sample: role, index, finish_reason, token_ids, logprobs, divergence or null
    usage   the last message of a whole answer
    end     the call is over: code, the gRPC status

`loadtest.ledger` reads it. Score has no journal: nothing is sampled there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from protos.tandem.v1 import inference_pb2 as pb

OK = grpc.StatusCode.OK.name
AnyRequest = pb.GenerateRequest | pb.CompareRequest

_ROLES = {pb.ROLE_STUDENT: "student", pb.ROLE_TEACHER: "teacher"}
_BOTH = ["student", "teacher"]
_ROUTES = {
    pb.ROUTE_STUDENT: ["student"],
    pb.ROUTE_TEACHER: ["teacher"],
    pb.ROUTE_BOTH: _BOTH,
}
_SUMS = ("num_tokens", "nonfinite_tokens", "k1_sum", "k2_sum", "k3_sum")


class Journal:
    """Writes one file of lines, which may be shared by the calls of one event loop or thread."""

    def __init__(self, path: Path) -> None:
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
                )
            case "complete":
                self._sample(request_id, response.complete.sample)
            case "usage":
                self._write(request_id, "usage")

    def compared(self, request_id: str, response: pb.CompareResponse) -> None:
        """Note the answer of a Compare."""
        for sample in response.samples:
            self._sample(request_id, sample)
        self._write(request_id, "usage")

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
            divergence=_divergence(sample) if sample.HasField("divergence") else None,
        )

    def _write(self, request_id: str, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"id": request_id, "event": event, **fields}) + "\n")

    def close(self) -> None:
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
        **{name: getattr(divergence, name) for name in _SUMS},
        "reference_logprobs": list(divergence.reference_logprobs),
    }


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


def read_journal(paths: Iterable[Path]) -> Iterable[dict[str, Any]]:
    """Yield the events of journals, one journal after the other.

    Raises:
        ValueError: a line is no event, with its place. The last line of a file may be cut, as a
            killed client leaves it, and is left out.
    """
    for path in paths:
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                event = json.loads(line)
                event["id"], event["event"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number} is no event: {line[:80]!r}") from None
            yield event
