"""A short load that moves every metric of quality: shadowed answers, exact comparisons, votes.

Runs on threads until it is stopped, through restarts of the server.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client

TASK = "sums"
PAUSE_S = 0.2  # after a call that failed: the server restarts


class ShadowedLoad:
    """`with ShadowedLoad(address) as load:`; `load.ended` counts calls by status code."""

    def __init__(self, address: str) -> None:
        self.ended: Counter[str] = Counter()
        self._address = address
        self._seeds = itertools.count()
        self._is_stopped = threading.Event()
        asks = (compare, compare, compare_exactly, answer, vote)
        self._threads = [threading.Thread(target=self._run, args=(ask,)) for ask in asks]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self, ask: Callable[[Client, int], object]) -> None:
        with Client(self._address, timeout_s=10) as client:
            while not self._is_stopped.is_set():
                try:
                    ask(client, next(self._seeds))
                except grpc.RpcError as error:
                    self.ended[error.code().name] += 1
                    self._is_stopped.wait(PAUSE_S)
                else:
                    self.ended["OK"] += 1


def compare(client: Client, seed: int) -> None:
    """Have both models answer at length, and score each other: many tokens for k3."""
    client.compare(
        pb.CompareRequest(
            prompt=_sum(seed),
            sampling=pb.SamplingParams(num_samples=4, max_tokens=64, ignore_eos=True, seed=seed),
            evaluation=pb.EvaluationOptions(task=TASK),
        )
    )


def compare_exactly(client: Client, seed: int) -> None:
    """Have both models answer, and compare them over the full vocabulary."""
    client.compare(
        pb.CompareRequest(
            prompt=_sum(seed),
            sampling=pb.SamplingParams(num_samples=2, max_tokens=8, seed=seed),
            divergence=pb.DivergenceOptions(exact=True),
            evaluation=pb.EvaluationOptions(task=TASK),
        )
    )


def answer(client: Client, seed: int) -> None:
    """Have one model answer; the server scores the answer behind it."""
    client.generate(
        pb.GenerateRequest(
            prompt=_sum(seed),
            route=pb.ROUTE_AUTO,
            sampling=pb.SamplingParams(num_samples=2, max_tokens=8, seed=seed),
            divergence=pb.DivergenceOptions(enabled=False),
            evaluation=pb.EvaluationOptions(task=TASK),
        )
    ).result()


def vote(client: Client, seed: int) -> None:
    """Have both models answer in a digit or two, vote, and be judged."""
    client.compare(
        pb.CompareRequest(
            prompt=_sum(seed),
            sampling=pb.SamplingParams(num_samples=3, temperature=0.5, max_tokens=2, seed=seed),
            divergence=pb.DivergenceOptions(enabled=False),
            evaluation=pb.EvaluationOptions(
                answer_format="last_number",
                reference_answer=str(seed % 7 + seed % 5),
                pass_at_k=[1, 2],
                task=TASK,
            ),
        )
    )


def _sum(seed: int) -> str:
    return f"{seed % 7} + {seed % 5} = "
