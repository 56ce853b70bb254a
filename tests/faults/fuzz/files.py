"""Bytes as a file that an operator or a client's machine hands over: read, or told in one error."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bundle.errors import UserError
from loadtest.client.requests_file import read_requests, write_requests
from loadtest.ledger.journal import read_journal
from loadtest.ledger.ledger import check as check_ledger
from loadtest.ledger.ledger import render
from loadtest.records import Phase, PlannedRequest, RequestRecord, SampleRecord
from loadtest.workload.arrivals import read_trace
from loadtest.workload.dataset import load_jsonl
from serve.client.access import read_token
from serve.client.channel import Endpoint
from serve.rpc.credentials.tokens import SCOPES, TokenFile
from tests.faults.fuzz.scratch import scratch_folder

SHA256 = "8281e31fa6574f3561cfa2070634eabf2e91a1d55c18b601428d1a06ca040011"
MAX_MESSAGE_CHARS = 2000


def _tokens(path: Path) -> None:
    client = TokenFile(path).identify("x")
    assert client is None or client.scopes <= SCOPES, client


def _token(path: Path) -> None:
    try:
        Endpoint("127.0.0.1:1", read_token(path)).metadata()
    except ValueError as error:  # which commands tell as a UserError
        raise UserError(str(error)) from error


def _journal(path: Path) -> None:
    try:
        render(check_ledger(read_journal([path]), read_journal([path])))
    except ValueError as error:  # which the command prints
        raise UserError(str(error)) from error


_WRONG = (
    *[("tokens", text) for text in (
        "", "\udcff", "a b", "a b c", f"ada {SHA256} all", f"-a {SHA256} control",
        f"a {SHA256} control\na {SHA256[::-1]} control", f"a {SHA256} control\nb {SHA256} control",
        f"a {SHA256} control,control",
    )],
    *[("token", text) for text in ("", "\udcff", "a b", "\u00e9", " \nx")],
    *[("trace", text) for text in ("", "\udcff", "x", "2\n1", "nan", "1e999", "-1", "\x1b[2J")],
    *[("dataset", text) for text in (
        "\udcff", "[]", "{}", '{"prompt": "a", "x\\u001b": 1}', '{"prompt": "a", "answer": "1"}\n'
        '{"prompt": "a", "answer": "2"}', '{"prompt": "a", "id": "i"}\n{"prompt": "b", "id": "i"}',
        '{"prompt": "a", "answer_format": "\\u001b"}', '{"prompt": "a", "answer_format": "boxed"}',
        '{"prompt": "a", "answer": "}{", "answer_format": "boxed"}', '{"prompt": "\\ud800"}',
        '{"prompt": "a", "answer": "1", "answer_format": "none"}',
    )],
)  # fmt: skip
READERS: Mapping[str, Callable[[Path], object]] = {
    "tokens": _tokens,
    "token": _token,
    "journal": _journal,
    "requests": read_requests,
    "trace": read_trace,
    "dataset": load_jsonl,
}
KINDS = tuple(READERS)


def check(data: bytes) -> None:
    """Treat the first byte as the kind of file; raises where something is wrong.

    What is refused is told in lines that steer no terminal, and names the file.
    """
    if not data:
        return
    kind = KINDS[data[0] % len(KINDS)]
    path = scratch_folder("files") / kind
    path.write_bytes(data[1:])
    try:
        READERS[kind](path)
    except UserError as error:
        text = str(error)
        assert kind in text and len(text) < MAX_MESSAGE_CHARS, text[:200]
        assert all(line.isprintable() for line in text.split("\n")), text


def _events() -> Iterator[dict[str, Any]]:
    """Yield the journal of a whole call."""
    yield {"event": "sent", "what": "w", "seed": 1, "roles": ["student"], "num_samples": 1,
           "max_tokens": 4, "streams": True, "vote": "exact"}  # fmt: skip
    sample = {"role": "student", "index": 0, "token_ids": [5], "logprobs": [-1.0], "text": "a"}
    yield {"event": "tokens", "position": 0, **sample}
    numbers = dict.fromkeys(("num_tokens", "nonfinite_tokens", "large_ratio_tokens"), 0)
    numbers |= dict.fromkeys(("k1_sum", "k2_sum", "k3_sum", "k1_mean", "k2_mean", "k3_mean"), 0)
    divergence = numbers | {"num_tokens": 1, "max_abs_log_ratio": 0.0, "reference_logprobs": [-1]}
    yield {"event": "sample", "finish_reason": "FINISH_REASON_STOP", "answer": "a",
           "correct": None, "divergence": divergence, "divergence_error": "", **sample}  # fmt: skip
    vote = {"answer": "a", "share": 1.0, "num_valid": 1, "num_samples": 1, "tie": False}
    yield {"event": "agreement", "student": vote, "teacher": None, "same_answer": None,
           "student_pass_at_k": {"1": 0.0}, "teacher_pass_at_k": {}}  # fmt: skip
    yield {"event": "usage", "request_id": "x", "seed": 1, "completion_tokens": {"student": 1}}
    yield {"event": "end", "code": "OK"}


def _lines(values: Iterator[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def _record() -> bytes:
    plan = PlannedRequest(0, "student", 1.0, 0, 0, "p", 1, Phase.MEASURED, 0.5)
    path = scratch_folder("files") / "record"
    write_requests(path, [RequestRecord(plan, 0.5, samples=[SampleRecord(0, per_token_k3=[0.1])])])
    return path.read_bytes()


def seeds() -> Iterator[bytes]:
    """Yield a good file of each kind, and files with a value of another type somewhere."""
    journal = [{"id": "x", **event} for event in _events()]
    tasks = [{"prompt": "a?", "answer": "4", "answer_format": "boxed", "id": "i"},
             {"prompt": "b?", "split": "test"}]  # fmt: skip
    files = {
        "tokens": f"# a\nada {SHA256} inference,control\nbob {SHA256[::-1]} control\n".encode(),
        "token": b"abc-DEF\nmore\n",
        "journal": _lines(iter(journal)),
        "requests": _record(),
        "trace": b"0\n0.5\n\n1e3\n",
        "dataset": _lines(iter(tasks)),
    }
    for kind, data in files.items():
        yield bytes([KINDS.index(kind)]) + data
    for kind, text in _WRONG:
        yield bytes([KINDS.index(kind)]) + text.encode("utf-8", "surrogateescape")
    for again in (journal[1], journal[2], journal[3], journal[4], journal[0], journal[5]):
        for place in range(1, len(journal) + 1):
            events = [*journal[:place], again, *journal[place:]]
            yield bytes([KINDS.index("journal")]) + _lines(iter(events))
    for left_out in range(len(journal)):
        events = [*journal[:left_out], *journal[left_out + 1 :]]
        yield bytes([KINDS.index("journal")]) + _lines(iter(events))
    for kind in ("journal", "requests", "dataset"):
        yield bytes([KINDS.index(kind)]) + b'{"id": ' + b"[" * 3000 + b"\n"
    for number, event in enumerate(journal):
        for name, value in itertools.product(event, (None, {}, [[]], "a", -1, 1e999)):
            changed = [*journal[:number], event | {name: value}, *journal[number + 1 :]]
            yield bytes([KINDS.index("journal")]) + _lines(iter(changed))
