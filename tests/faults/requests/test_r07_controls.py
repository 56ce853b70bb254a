"""Broken builds that R7, R8, R19 and R21 must object to."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import Counter

import serve.app.server
import serve.rpc.calls
import serve.rpc.checks
import serve.rpc.decoding
from serve.metrics.server_metrics import ServerMetrics
from serve.rpc.credentials.tokens import Identity, TokenFile
from serve.rpc.statuses import Status, abort
from tests.faults.requests import r07_malformed, r08_parameters, r19_labels, r21_credentials
from tests.faults.requests.corpus import cases
from tests.faults.requests.hostile import bomb
from tests.faults.result import RowResult, Size


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control needs a few calls only."""
    for module, name, count in (
        (r07_malformed, "NUM_MESSAGES", 60),
        (r07_malformed, "NUM_GOOD", 10),
        (r08_parameters, "NUM_ROUNDS", 1),
        (r08_parameters, "NUM_GOOD", 5),
        (r19_labels, "NUM_LABELS", 40),
    ):
        monkeypatch.setitem(getattr(module, name), Size.CI, count)


def problems(row: Any) -> str:
    result: RowResult = row.run(Size.CI)
    assert not result.is_passed
    return " ".join([*result.leaks, *result.problems])


def test_traceback_in_a_reply_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def abort_with_traceback(context: Any, status: Status) -> None:
        await abort(context, Status(status.code, 'Traceback: File "x.py"', status.details))

    monkeypatch.setattr(serve.rpc.calls, "abort", abort_with_traceback)
    assert "the reply says b'Traceback'" in problems(r07_malformed)


def test_line_for_each_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Any, *arguments: Any) -> Any:
        logging.getLogger("serve.rpc.calls").warning("a call came")
        return began(self, *arguments)

    began = serve.rpc.calls.CallGuard.begin
    monkeypatch.setattr(serve.rpc.calls.CallGuard, "begin", begin)
    assert "log lines in" in problems(r07_malformed)


def test_error_of_the_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> bytes:
        if data.endswith(b"\x0b"):
            raise KeyError("of a bug")
        return data

    monkeypatch.setattr(serve.rpc.decoding, "decompress", broken)
    assert "INTERNAL" in problems(r07_malformed)


def test_decompression_by_grpc_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [pair for pair in serve.app.server.SERVER_OPTIONS if "decompression" not in pair[0]]
    monkeypatch.setattr(serve.app.server, "SERVER_OPTIONS", tuple(options))
    monkeypatch.setattr(r07_malformed, "RAW_SHARE", 1.0)
    monkeypatch.setattr(r07_malformed, "raw_connections", lambda rng: {"gzip bomb": bomb()})
    monkeypatch.setitem(r07_malformed.NUM_MESSAGES, Size.CI, 2)
    assert "gzip bomb: neither the answer nor an end" in problems(r07_malformed)


def test_slow_and_wrong_refusals_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [
        case for case in cases(64) if case.name in ("flood of messages", "temperature nan", "route")
    ]
    monkeypatch.setattr(r08_parameters, "cases", lambda max_model_len: chosen)
    monkeypatch.setattr(serve.rpc.decoding, "scan", lambda data, descriptor: frozenset())
    monkeypatch.setattr(serve.rpc.checks.Checks, "raise_if_any", lambda self: None)
    text = problems(r08_parameters)
    assert "ms until it was refused" in text
    assert "temperature nan: OK" in text


def test_label_of_the_client_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_divergences(self: ServerMetrics, *arguments: Any, **options: Any) -> None:
        nonlocal number
        number += 1
        texts.labels(str(number)).inc()
        observe(self, *arguments, **options)

    class Metrics(ServerMetrics):
        def __init__(self, registry: Any) -> None:
            nonlocal texts
            super().__init__(registry)
            texts = Counter("texts", "of clients", ["text"], registry=registry)

    texts: Any = None
    number, observe = 0, ServerMetrics.on_divergences
    monkeypatch.setattr(ServerMetrics, "on_divergences", on_divergences)
    monkeypatch.setattr("tests.faults.rig.ServerMetrics", Metrics)
    assert "series," in problems(r19_labels)


def test_token_that_is_not_looked_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    anyone = Identity("anyone", frozenset({"inference"}))
    monkeypatch.setattr(TokenFile, "identify", lambda self, token: anyone)
    assert "wrong token: OK" in problems(r21_credentials)


def test_tokens_that_are_not_read_again_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.rpc.credentials.tokens.MIN_INTERVAL_S", 3600.0)
    text = problems(r21_credentials)
    assert "good clients failed" in text and "withdrawn token: OK" in text


def test_credentials_that_were_never_tried_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def try_nothing(self: object) -> None: ...

    monkeypatch.setattr(r21_credentials.Rotation, "bad_calls", try_nothing)
    text = problems(r21_credentials)
    assert "never tried: ['another CA for the server'" in text and "withdrawn" not in text
