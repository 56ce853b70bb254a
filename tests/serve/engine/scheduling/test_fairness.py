"""One client's many samples beside another client: turns, rows, and that only times change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from protos.tandem.v1 import inference_pb2 as pb
from serve.engine.engine import Engine
from serve.engine.sequence import FinishReason
from serve.models.backend import NUM_PREFILL_ROWS
from serve.pair.served import Role
from tests.support import engines
from tests.support.engines import LONG_PROMPT, PROMPT, EventReader, backend_of, run, submit
from tests.support.polling import wait_until

NUM_ROWS = 16


def make_engine(*, max_num_seqs: int = NUM_ROWS, **settings: Any) -> Engine:
    return engines.make_engine(max_num_seqs=max_num_seqs, max_model_len=256, **settings)


def ask(
    engine: Engine,
    client: str,
    prompt: tuple[int, ...] = PROMPT,
    request_id: str = "r",
    **fields: Any,
) -> EventReader:
    settings = {"max_tokens": 128, "ignore_eos": True, "seed": 3, **fields}
    return submit(engine, request_id, prompt, client=client, **settings)


def steps_until(engine: Engine, is_there: Callable[[], object]) -> int:
    for number in range(1, 2000):
        engine.core.step()
        assert engine.load().num_unaccounted == 0
        if is_there():
            return number
    raise AssertionError("it never came")


def busy(engine: Engine, num_samples: int = 64, num_steps: int = 40) -> EventReader:
    """Have one client fill all rows, and be in the middle of it."""
    many = ask(engine, "many", num_samples=num_samples)
    for _ in range(num_steps):
        engine.core.step()
    assert engine.load().num_running == NUM_ROWS
    return many


# Another client's first token


@pytest.mark.parametrize("num_samples", [16, 64])
@pytest.mark.parametrize("client", ["other", "many"])
@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT])
def test_first_token_of_another_request_waits_for_no_sample_to_end(
    num_samples: int, client: str, prompt: tuple[int, ...]
) -> None:
    """Also of the same client: without tokens all that call from one host are one."""
    idle = make_engine(max_pass_tokens=8)
    few = ask(idle, client, prompt)
    idle_steps = steps_until(idle, lambda: few.tokens)
    engine = make_engine(max_pass_tokens=8)
    many = busy(engine, num_samples)
    few = ask(engine, client, prompt)
    assert steps_until(engine, lambda: few.tokens) <= idle_steps + 1
    assert not many.endings
    run(engine)


def test_who_comes_during_a_decode_step_waits_for_no_other_one() -> None:
    engine = make_engine()
    busy(engine)
    readers: list[EventReader] = []

    def before_pass(first_row: int, rows: object) -> None:
        if not readers:
            readers.append(ask(engine, "other", temperature=0.0))

    backend_of(engine).before_pass = before_pass
    engine.core.step()
    assert len(readers[0].tokens[0]) == 1


def test_as_many_clients_as_there_are_rows_need_not_wait() -> None:
    engine = make_engine()
    busy(engine)
    others = [ask(engine, f"client {i}", num_samples=5) for i in range(NUM_ROWS - 1)]
    assert steps_until(engine, lambda: all(other.tokens for other in others)) <= NUM_ROWS
    assert engine.load().num_running == NUM_ROWS
    run(engine)


def test_clients_come_to_have_the_same_rows() -> None:
    engine = make_engine()
    many = busy(engine)
    ask(engine, "other", num_samples=64)
    steps_until(engine, lambda: len(many.endings) >= NUM_ROWS)
    rows = Counter(sequence.client for sequence in engine.core.scheduler.rows.running)
    assert rows == {"many": NUM_ROWS // 2, "other": NUM_ROWS // 2}
    run(engine)


def test_one_client_alone_has_all_rows() -> None:
    engine = make_engine()
    many = ask(engine, "many", num_samples=NUM_ROWS)
    assert steps_until(engine, lambda: len(many.endings) == NUM_ROWS) == 128


def test_client_that_is_limited_leaves_rows_free_and_its_requests_share() -> None:
    engine = make_engine(max_num_seqs_per_client=4)
    ask(engine, "many", num_samples=64, max_tokens=20)
    steps_until(engine, lambda: engine.load().num_running == 4)
    few = ask(engine, "many")
    steps_until(engine, lambda: few.tokens)
    other = ask(engine, "other", num_samples=6)
    steps_until(engine, lambda: len(other.tokens) == 4)
    rows = Counter(sequence.client for sequence in engine.core.scheduler.rows.running)
    assert rows == {"many": 4, "other": 4}
    run(engine)


@pytest.mark.parametrize("route", [pb.ROUTE_STUDENT, pb.ROUTE_TEACHER, pb.ROUTE_BOTH])
def test_caller_gets_first_tokens_while_another_call_of_its_host_has_all_rows(
    serving: Any, make_pair: Any, route: pb.Route.ValueType
) -> None:
    pair = make_pair(max_model_len=4000, max_waiting=200)
    roles = [Role.STUDENT, Role.TEACHER]
    roles = {pb.ROUTE_STUDENT: roles[:1], pb.ROUTE_TEACHER: roles[1:]}.get(route, roles)
    backends = [pair.backends[role] for role in roles]
    with serving(pair) as live:
        many = call(live, route, num_samples=64, max_tokens=500)
        next(many)
        for backend in backends:
            backend.hold_after = 3
            assert backend.is_held.wait(10)
        few = call(live, route, num_samples=1, max_tokens=500)
        wait_until(lambda: all(pair.value("sequences_waiting", role=r.value) == 57 for r in roles))
        for role in roles:
            running = pair.engines.get(role).engine.core.scheduler.rows.running
            assert {sequence.client for sequence in running} == {"host ipv4:127.0.0.1"}
        for backend in backends:
            backend.is_held.clear()
            backend.hold_after = 5  # passes, of those that are to come
            backend.may_run.set()
        seen = set()
        while len(seen) < len(roles):
            seen.add(next(few).tokens.role)
        for role in roles:
            assert pair.value("samples_total", role=role.value, finish_reason="length") == 0
        many.cancel()
        few.cancel()
        for backend in backends:
            backend.hold_after = 0
            backend.may_run.set()


def call(live: Any, route: pb.Route.ValueType, **sampling: int) -> Any:
    params = pb.SamplingParams(ignore_eos=True, **sampling)
    request = pb.GenerateRequest(prompt="x", route=route, sampling=params)
    return live.stub.Generate(request, timeout=30)


# What it costs those who make way


@pytest.mark.parametrize("max_prefix_cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("max_pass_tokens", [8, 64])
def test_samples_that_were_set_aside_get_the_tokens_that_they_would_have_got(
    max_pass_tokens: int, max_prefix_cache_bytes: int
) -> None:
    fields = {"num_samples": 24, "max_tokens": 20, "temperature": 1.0, "repetition_penalty": 1.3}
    alone = make_engine(max_num_seqs=24)
    expected = ask(alone, "many", LONG_PROMPT, **fields)
    run(alone)
    engine = make_engine(
        max_num_seqs=4,
        max_pass_tokens=max_pass_tokens,
        max_prefix_cache_bytes=max_prefix_cache_bytes,
    )
    many, num_aside = ask(engine, "many", LONG_PROMPT, **fields), 0
    for number in range(120):
        if number % 3 == 0:
            ask(engine, f"client {number % 4}", (number % 30 + 4,) * 3, max_tokens=6)
        engine.core.step()
        num_aside += sum(s.kv is not None for s in engine.core.scheduler.rows.waiting)
    run(engine)
    assert num_aside > 50, "hardly anybody made way"
    assert many.completions == expected.completions


def test_no_more_are_set_aside_than_there_are_rows() -> None:
    engine = make_engine()
    busy(engine)
    aside = next(s for s in engine.core.scheduler.rows.waiting)
    few = ask(engine, "other")
    engine.core.inbox.run()
    for _ in range(NUM_ROWS):
        engine.core.scheduler.rows.waiting.put_back(replace(aside, kv=torch.empty(0)))
    assert engine.core.scheduler.rows.find_claim(0.0) is None
    first = engine.core.scheduler.rows.waiting.next({}, NUM_ROWS)
    assert first is not None
    first.kv = None
    claim = engine.core.scheduler.rows.find_claim(0.0)
    assert claim is not None and claim.newcomer.client == "other" and not few.tokens


def test_client_that_makes_way_keeps_a_row_and_nobody_moves_to_and_fro() -> None:
    engine = make_engine(max_num_seqs=2)
    set_aside: list[Any] = []
    keep = engine.core.scheduler.rows.set_aside
    engine.core.scheduler.rows.set_aside = lambda s: set_aside.append(s) or keep(s)  # type: ignore
    first = ask(engine, "a", num_samples=2, max_tokens=30)
    engine.core.step()
    readers = [first, *(ask(engine, client, num_samples=2, max_tokens=30) for client in "bc")]
    run(engine)
    assert [len(reader.endings) for reader in readers] == [2, 2, 2]
    assert len(set_aside) == 1


def test_prompt_that_cannot_enter_yet_sets_nobody_aside() -> None:
    engine = make_engine(max_num_seqs=8, max_pass_tokens=8)
    for number in range(NUM_PREFILL_ROWS):
        ask(engine, f"client {number}", (number + 4, *LONG_PROMPT * 4), max_tokens=60)
    ask(engine, "many", num_samples=4)
    steps_until(engine, lambda: engine.load().num_running == 8)
    ask(engine, "other", LONG_PROMPT)
    engine.core.step()
    assert len(engine.core.scheduler.rows.running) == 4
    assert not any(sequence.kv is not None for sequence in engine.core.scheduler.rows.waiting)
    run(engine)


def test_samples_that_are_set_aside_are_cancelled_like_others() -> None:
    engine = make_engine()
    many = busy(engine)
    few = ask(engine, "other", request_id="few")
    steps_until(engine, lambda: few.tokens)
    engine.cancel("r")
    engine.core.step()
    assert set(many.reasons) == {FinishReason.CANCELLED}
    assert min(map(len, many.tokens.values())) > 30, "the one that was set aside lost its own"
    run(engine)
    assert few.reasons == [FinishReason.LENGTH]


def test_where_memory_is_short_nobody_is_set_aside_and_nobody_harmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(max_prefix_cache_bytes=0)
    many = busy(engine)

    def read_kv(*where: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend_of(engine), "read_kv", read_kv)
    few = ask(engine, "other")
    steps_until(engine, lambda: few.tokens)
    assert len(many.endings) == NUM_ROWS
    run(engine)
    assert {*many.reasons, *few.reasons} == {FinishReason.LENGTH}
