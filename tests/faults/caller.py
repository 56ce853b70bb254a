"""A client of every kind in one: streams, comparisons, scores, cancels, short deadlines, mistakes.

    python -m tests.faults.caller TARGET JOURNAL SEED

It calls until it is killed, and has then a journal with some calls open.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from loadtest.ledger.journal import OK, Journal
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient

NUM_TEMPLATES = 40
_NUM_WORKERS = 6
_CALLS_PER_CONNECTION = 50
_FIRST_TOKEN, _LAST_TOKEN = 4, 39
_ROUTES = (pb.ROUTE_STUDENT, pb.ROUTE_TEACHER, pb.ROUTE_BOTH)

AnyRequest = pb.GenerateRequest | pb.CompareRequest


def templates() -> list[AnyRequest]:
    """Return what is asked for, without ids: the same in every process."""
    rng = random.Random(5)
    return [_template(rng, number) for number in range(NUM_TEMPLATES)]


def _template(rng: random.Random, number: int) -> AnyRequest:
    prompt = pb.TokenIds(ids=rng.choices(range(_FIRST_TOKEN, _LAST_TOKEN), k=rng.randint(1, 16)))
    sampling = pb.SamplingParams(
        num_samples=rng.choice([1, 1, 2, 4]),
        seed=number,
        max_tokens=rng.randint(1, 24),
        temperature=1.0,
    )
    if number % 4 == 0:
        return pb.CompareRequest(prompt_token_ids=prompt, sampling=sampling)
    return pb.GenerateRequest(
        prompt_token_ids=prompt, sampling=sampling, route=_ROUTES[number % len(_ROUTES)]
    )


@dataclass(slots=True)
class Caller:
    """Calls of all kinds, journalled but for the scores; `codes` counts how they ended."""

    target: str
    journal: Journal
    name: str
    codes: Counter[str] = field(default_factory=Counter)
    _num_sent: int = 0

    async def run(self, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Call on some connections at a time, each of which ends after some calls."""
        async with asyncio.TaskGroup() as group:
            for number in range(_NUM_WORKERS):
                group.create_task(self._work(random.Random(f"{self.name} {number}"), goes_on))

    async def run_once(self) -> None:
        """Send every template, and follow it to its end: a reference for the others."""
        async with AsyncClient(self.target, max_attempts=1, timeout_s=60) as client:
            for template in templates():
                await self._whole(client, self._with_id(template))

    async def _work(self, rng: random.Random, goes_on: Callable[[], bool]) -> None:
        requests = templates()
        while goes_on():
            async with AsyncClient(self.target, max_attempts=1, timeout_s=60) as client:
                for _ in range(_CALLS_PER_CONNECTION):
                    if not goes_on():
                        break
                    await self._call(client, rng, self._with_id(rng.choice(requests)))

    def _with_id(self, template: AnyRequest) -> AnyRequest:
        self._num_sent += 1
        request = type(template).FromString(template.SerializeToString())
        request.request_id = f"{self.name}-{self._num_sent}"
        return request

    async def _call(self, client: AsyncClient, rng: random.Random, request: AnyRequest) -> None:
        kind = rng.random()
        if kind < 0.1:
            await self._unjournalled(client.score(_score_of(request)))
        elif kind < 0.15:
            await self._unjournalled(client.score(pb.ScoreRequest()))  # refused
        elif kind < 0.2 and isinstance(request, pb.GenerateRequest):
            request.route = pb.ROUTE_AUTO  # which the other model may score behind the answer
            await self._unjournalled(client.generate(request).result())
        elif kind < 0.3 and isinstance(request, pb.GenerateRequest):
            await self._cancelled(client, request, rng.randint(0, 10))
        elif kind < 0.4:
            await self._whole(client, request, timeout_s=rng.uniform(0.005, 0.05))
        else:
            await self._whole(client, request)

    async def _whole(
        self, client: AsyncClient, request: AnyRequest, timeout_s: float | None = None
    ) -> None:
        self.journal.sent(request)
        if isinstance(request, pb.GenerateRequest):
            stream = client.generate(request, timeout_s)
            self.codes[await self.journal.follow(request, stream)] += 1
            return
        code = OK
        try:
            answer = await client.compare(request, timeout_s)
            self.journal.compared(request.request_id, answer)
        except grpc.RpcError as error:
            code = error.code().name
        self.journal.ended(request.request_id, code)
        self.codes[code] += 1

    async def _cancelled(
        self, client: AsyncClient, request: pb.GenerateRequest, num_events: int
    ) -> None:
        self.journal.sent(request)
        async with client.generate(request) as stream:
            for _ in range(num_events):
                if (event := await anext(stream, None)) is None:
                    break
                self.journal.received(request.request_id, event)
        self.journal.ended(request.request_id, "CANCELLED")
        self.codes["CANCELLED"] += 1

    async def _unjournalled(self, call: Awaitable[object]) -> None:
        code = OK
        try:
            await call
        except grpc.RpcError as error:
            code = error.code().name
        self.codes[code] += 1


def _score_of(request: AnyRequest) -> pb.ScoreRequest:
    completions = [pb.Completion(token_ids=pb.TokenIds(ids=[5, 6, 7]))]
    return pb.ScoreRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        completions=completions,
    )


async def _main(target: str, journal: Path, name: str) -> None:
    with Journal(journal) as opened:
        await Caller(target, opened, name).run()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
