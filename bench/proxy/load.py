"""Calls to servers that fail: their codes, their latencies, and whether the answers are right.

Every call is seeded, so that each model has one right answer to it: that of a run without faults.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client
from serve.client.channel import MAX_ATTEMPTS

NUM_SEEDS = 50
_TIMEOUT_S = 60.0
_MAX_OPEN = 1000  # calls at the same time of an open loop
_FINISHED = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)

Tokens = tuple[pb.Role, int, tuple[int, ...]]
"""Of one sample: who wrote it, its index, and its token ids."""


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """The samples that a call returned whole, and whether all of them have their divergence.

    `has_primary`: the one that the caller came for is among them.
    """

    samples: tuple[Tokens, ...]
    has_primary: bool
    has_divergences: bool = False

    @classmethod
    def of(cls, samples: Iterable[pb.Sample], role: pb.Role | None = None) -> WholeAnswer:
        """`role` is that of the primary sample; None: of any."""
        whole = [sample for sample in samples if sample.finish_reason in _FINISHED]
        return cls(
            tuple((s.role, s.index, tuple(s.token_ids)) for s in whole),
            any(role in (None, sample.role) for sample in whole),
            all(sample.HasField("divergence") for sample in whole),
        )


Right = Set[tuple[int, Tokens]]
"""Every right sample, by the seed of its call."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended; times are monotonic.

    `code` is OK, gRPC's, NO_ANSWER without the primary sample, or WRONG with other tokens.
    """

    sent_s: float
    ended_s: float
    code: str
    has_divergences: bool = False


Ask = Callable[[Client, int], WholeAnswer]


def generating(
    max_tokens: int = 8, route: pb.Route = pb.ROUTE_STUDENT, *, is_streamed: bool = False
) -> Ask:
    """Return a Generate of one sample; unless streamed, its first response is its end."""

    def ask(client: Client, seed: int) -> WholeAnswer:
        request = pb.GenerateRequest(
            prompt=f"What is {seed} plus 4?",
            route=route,
            sampling=_sampling(max_tokens, seed),
            output=pb.OutputOptions(stream=is_streamed),
        )
        return WholeAnswer.of(client.generate(request).result().samples)

    return ask


def comparing(max_tokens: int = 8) -> Ask:
    """Return a Compare, whose primary sample is the student's."""

    def ask(client: Client, seed: int) -> WholeAnswer:
        request = pb.CompareRequest(
            prompt=f"What is {seed} plus 4?", sampling=_sampling(max_tokens, seed)
        )
        return WholeAnswer.of(client.compare(request).samples, pb.ROLE_STUDENT)

    return ask


def list_models(client: Client, seed: int) -> WholeAnswer:
    """Ask for what costs a server next to nothing."""
    return WholeAnswer((), bool(client.get_models().models))


def _sampling(max_tokens: int, seed: int) -> pb.SamplingParams:
    return pb.SamplingParams(seed=seed, temperature=1, max_tokens=max_tokens, ignore_eos=True)


def right_answers(target: str, *asks: Ask) -> Right:
    """Return the samples that some calls get while nothing fails."""
    calls = [(seed, ask) for ask in asks for seed in range(NUM_SEEDS)]
    with Client(target, timeout_s=_TIMEOUT_S) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda call: call[1](client, call[0]), calls))
    return {
        (seed, tokens)
        for (seed, _), answer in zip(calls, answers, strict=True)
        for tokens in answer.samples
    }


class CallLoad:
    """Calls on threads of their own, during a `with` block, whose end waits for the last answers.

    `num_workers` call one after the other (closed loop), or calls come at `rate_rps`. A sample that
    is not among the `right` ones is wrong.
    """

    def __init__(
        self,
        target: str,
        ask: Ask,
        right: Right = frozenset(),
        *,
        num_workers: int = 0,
        rate_rps: float = 0.0,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        assert (num_workers > 0) != (rate_rps > 0)
        self.outcomes: list[Outcome] = []
        self._client = Client(target, timeout_s=_TIMEOUT_S, max_attempts=max_attempts)
        self._ask = ask
        self._right = right
        self._rate_rps = rate_rps
        self._is_over = threading.Event()
        self._seeds = itertools.cycle(range(NUM_SEEDS))
        self._num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers or _MAX_OPEN, "load")
        self._workers: list[Future[None]] = []

    def __enter__(self) -> Self:
        if self._rate_rps:
            self._workers.append(self._pool.submit(self._send_at_rate))
        for _ in range(self._num_workers):
            self._workers.append(self._pool.submit(self._work))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        with self._client, self._pool:
            for worker in self._workers:
                worker.result()

    @property
    def num_calls(self) -> int:
        """How many calls have ended."""
        return len(self.outcomes)

    def codes(self) -> Counter[str]:
        return Counter(outcome.code for outcome in self.outcomes)

    def wait_for_calls(self, num_more: int, timeout_s: float = _TIMEOUT_S) -> None:
        """Return when so many more calls have ended; TimeoutError if they do not."""
        goal, until_s = self.num_calls + num_more, time.monotonic() + timeout_s
        while self.num_calls < goal:
            if time.monotonic() > until_s:
                raise TimeoutError(f"{self.num_calls} of {goal} calls ended: {self.codes()}")
            time.sleep(0.01)

    def _work(self) -> None:
        while not self._is_over.is_set():
            self._call()

    def _send_at_rate(self) -> None:
        began_s = time.monotonic()
        for num_sent in itertools.count(1):
            self._workers.append(self._pool.submit(self._call))
            if self._is_over.wait(max(began_s + num_sent / self._rate_rps - time.monotonic(), 0)):
                break

    def _call(self) -> None:
        seed, sent_s = next(self._seeds), time.monotonic()
        try:
            answer = self._ask(self._client, seed)
        except grpc.RpcError as error:
            outcome = Outcome(sent_s, time.monotonic(), error.code().name)
        else:
            code = self._judge(seed, answer)
            outcome = Outcome(sent_s, time.monotonic(), code, answer.has_divergences)
        self.outcomes.append(outcome)

    def _judge(self, seed: int, answer: WholeAnswer) -> str:
        if any((seed, tokens) not in self._right for tokens in answer.samples):
            return "WRONG"
        return "OK" if answer.has_primary else "NO_ANSWER"
